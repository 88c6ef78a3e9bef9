"""The docs against the project: links, the map of the folders, targets, settings, and form."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from stages.make.help import targets, with_settings
from stages.make.stale import MAKE_VARIABLES
from stages.run.setting import variable
from stages.run.settings import SECRET, Settings
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/demo/README.md"])
# Variables of docker/run, the image, the tests and libraries, which are no settings.
OTHER_VARIABLES = {
    *("BASE_IMAGE", "REQUIREMENTS", "PIP_EXTRA_INDEX_URL"),
    *("DOCKER_OPTIONS", "EFA", "TEST_IMAGE", "TORTURE_SEED", "HF_HUB_OFFLINE"),
}
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=short)


def code(text: str) -> list[str]:
    """The code of a page: its blocks, indented or fenced, and what is between backticks."""
    indented = re.findall(r"^ {4}.+$", text, re.MULTILINE)
    return [*FENCED.findall(text), *indented, *re.findall(r"`([^`\n]+)`", FENCED.sub("", text))]


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def mapped_folders() -> Iterator[Path]:
    """Every path of the README's map, and the folders that its descriptions name."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Where things are")[1].split("\n## ")[0]
    outer = ROOT
    for indent, name, about in re.findall(r"^( {4,})(\S+) +(.+)$", block, re.MULTILINE):
        path = (outer if len(indent) > 4 else ROOT) / name
        outer = outer if len(indent) > 4 else path
        if name != "outputs/":
            yield path
            inner = re.findall(r"(?<![\w/])([a-z]+/)(?=[\s,]|$)", about)
            yield from (path / folder for folder in inner if folder != "stages/")


@each_page
def test_every_local_link_leads_somewhere(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not fragment or fragment in anchors(target), link


@pytest.mark.parametrize("path", sorted(set(mapped_folders())), ids=short)
def test_every_folder_of_the_readmes_map_exists(path: Path) -> None:
    assert path.exists()


def test_the_docs_have_todays_settings() -> None:
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert with_settings(page) == page, "Write the table again: help.py --docs"


@each_page
def test_every_target_that_the_docs_mention_is_in_the_makefile(page: Path) -> None:
    known = {name for name, _ in targets(ROOT / "Makefile")}
    text = "\n".join(code(page.read_text(encoding="utf-8")))
    assert set(re.findall(r"(?m)^\s*(?:make|docker/run) ([a-z][a-z-]*)", text)) <= known


@each_page
def test_every_setting_that_the_docs_set_is_a_setting(page: Path) -> None:
    known = {variable(f) for f in fields(Settings)} | set(MAKE_VARIABLES) | OTHER_VARIABLES
    text = "\n".join(code(page.read_text(encoding="utf-8")))
    names = set(re.findall(r"\b([A-Z][A-Z0-9_]+) ?\??=", text))
    assert not {name for name in names - known if not SECRET.fullmatch(name)}


def test_the_readme_is_a_front_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@each_page
def test_lines_of_prose_have_at_most_100_columns(page: Path) -> None:
    prose = FENCED.sub("", page.read_text(encoding="utf-8")).splitlines()
    long = [line for line in prose if len(line) > 100 and "http" not in line]
    assert not [line for line in long if not line.startswith("|")]  # tables may be wide


def test_both_pictures_of_the_stages_differ_only_in_their_colours() -> None:
    light, dark = (ROOT / f"docs/images/stages-{theme}.svg" for theme in ("light", "dark"))
    for picture in (light, dark):
        ElementTree.parse(picture)
    first, second = (re.sub(r"#[0-9a-f]{6}", "#", picture.read_text()) for picture in (light, dark))
    assert first == second
