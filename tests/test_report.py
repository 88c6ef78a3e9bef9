"""The page in a real browser: nothing is asked of the network, nothing widens it, text is text."""

from __future__ import annotations

import http.client
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from stages.page.facts import facts_of
from stages.page.render import MOST_CHARACTERS, render
from stages.page.serve import Page, server_of
from stages.run.errors import InputError
from stages.run.settings import Settings
from tests.conftest import ROOT, Project, clean_environment
from tests.page.run_folder import DATA, EVAL, compare, log_steps, publish

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1440)
HOSTILE = "</script><script>window.ran = 1</script><img src=x onerror='ran=1'>\"'`{{ 7 * 7 }}&amp;"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab that fails the test for a request beside its pages' own, and for what the console
    shows."""
    context = browser.new_context()
    context.set_default_timeout(5000)
    tab = context.new_page()
    wrong: list[str] = []
    context.on(
        "request", lambda one: one.url.startswith(("file:", "data:")) or wrong.append(one.url)
    )
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    yield tab
    context.close()
    assert not wrong


def saved(run: Path) -> str:
    """The address of the page about `run`."""
    page = run / "report.html"
    page.write_text(render(facts_of(run, Settings())), encoding="utf-8")
    return page.as_uri()


def vertices(tab: Any, curve: str) -> int:
    """The points of a curve."""
    path = tab.locator(f"#{curve} path").first.get_attribute("d")
    return path.count("M") + path.count("L")


def assert_fits(tab: Any) -> None:
    for width in WIDTHS:
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_make_report_writes_the_page_of_a_run(built: Project, tab: Any) -> None:
    said = built.make("report", "RECIPE=tiny", "INSTANCE_PRICE=1.34").stdout
    assert said.splitlines()[-1] == "report: outputs/tiny/report.html"
    tab.goto((built.folder / "outputs/tiny/report.html").as_uri())
    assert tab.inner_text("h1") == "data/tiny on data/tiny/rows.jsonl"
    assert vertices(tab, "loss-training") == vertices(tab, "learning-rate") == 2  # MAX_STEPS
    assert tab.locator("#answers article").count() >= 2
    assert tab.locator("#stages tbody").first.locator("tr").count() == 6
    assert_fits(tab)
    found = built.manifest("data")["metrics"]
    assert found["repeated"]["compared"] == sum(found["lengths"]["counts"]) == 20
    assert found["repeated"]["prompts"] == 2
    assert "20 different documents were compared" in tab.inner_text("#data")


def test_a_curve_has_one_point_for_each_step(tmp_path: Path, tab: Any) -> None:
    log_steps(tmp_path / "train", [3.0 - n / 300 for n in range(300)], {100: 2.5, 200: 2.2})
    tab.goto(saved(tmp_path))
    assert vertices(tab, "loss-training") == 300
    assert vertices(tab, "loss-validation") == 2


def test_of_very_many_steps_at_most_a_thousand_are_drawn_and_it_is_said(
    tmp_path: Path, tab: Any
) -> None:
    log_steps(tmp_path / "train", [1.0] * 2500, {})
    tab.goto(saved(tmp_path))
    assert vertices(tab, "throughput") == 834
    assert "Of 2,500 logged steps" in tab.inner_text("#training")


def test_text_of_datasets_and_models_stays_text(tmp_path: Path, tab: Any) -> None:
    publish(tmp_path, "data", {**DATA, "columns": HOSTILE})
    publish(tmp_path, "train", {}, {"PROMPT_TEMPLATE": HOSTILE, "MODEL_ID": HOSTILE})
    publish(tmp_path, "eval", EVAL)
    compare(tmp_path, (HOSTILE, "w" * 10_000, "left \u202e thgir", HOSTILE))
    tab.goto(saved(tmp_path))
    assert tab.evaluate("window.ran") is None
    assert tab.locator("script, #answers img").count() == 0
    assert tab.inner_text("#answers h3").strip() == HOSTILE
    assert HOSTILE in tab.inner_text("h1") and HOSTILE in tab.inner_text("#data")
    shown = tab.inner_text("#answers")
    assert "left \\u202e thgir" in shown and "\u202e" not in shown
    assert f"{10_000 - MOST_CHARACTERS:,} more characters" in shown
    assert_fits(tab)


def test_paper_shows_the_settings_too(tmp_path: Path, tab: Any) -> None:
    publish(tmp_path, "train", {}, {"LEARNING_RATE": 0.0001})
    tab.goto(saved(tmp_path))
    setting = tab.get_by_text("LEARNING_RATE")
    assert not setting.is_visible()
    tab.emulate_media(media="print")
    assert setting.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_themes(
    tmp_path: Path, tab: Any, scheme: str
) -> None:
    log_steps(tmp_path / "train", [3.0, 2.0], {2: 2.5})
    tab.emulate_media(color_scheme=scheme)
    tab.goto(saved(tmp_path))
    luminance = """name => {
        const colour = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
        const full = colour.length === 4 ? colour.replace(/[^#]/g, "$&$&") : colour;
        const [r, g, b] = [1, 3, 5].map(n => parseInt(full.slice(n, n + 2), 16) / 255)
            .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    }"""
    paper = tab.evaluate(luminance, "--paper")
    for name in ("--ink", "--muted", "--first", "--second", "--good"):
        lighter, darker = sorted((paper, tab.evaluate(luminance, name)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name  # WCAG 2.2, 1.4.3
    assert tab.locator("#loss-training path").first.evaluate(
        "one => getComputedStyle(one).stroke"
    ) == tab.locator(".key").first.evaluate(
        "one => getComputedStyle(one, '::before').backgroundColor"
    )


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """The port of a server of the page about `tmp_path`."""
    with server_of(Page(tmp_path, Settings()), 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture
def watching(browser: Any, port: int) -> Iterator[Any]:
    """A tab that shows the served page; fails the test for a request to anywhere else."""
    context = browser.new_context()
    context.set_default_timeout(15000)
    tab, wrong = context.new_page(), list[str]()
    here = f"http://127.0.0.1:{port}/"
    context.on("request", lambda one: one.url in (here, "data:,") or wrong.append(one.url))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.goto(here)
    yield tab
    context.close()
    assert not wrong


def test_a_served_page_follows_the_training_without_loading_again(
    tmp_path: Path, watching: Any
) -> None:
    tab = watching
    publish(tmp_path, "data", DATA, {"SEED": 42})
    tab.wait_for_selector("#data table")
    tab.locator("summary").first.click()
    tab.evaluate("window.same = document.getElementById('data')")
    log_steps(tmp_path / ".work" / "train-abc", [3.0, 2.5, 2.0], {})
    tab.wait_for_selector("#loss-training")
    assert vertices(tab, "loss-training") == 3
    log_steps(tmp_path / ".work" / "train-abc", [3.0, 2.5, 2.0, 1.9], {})
    tab.locator("#summary .lead", has_text="4 steps").wait_for()
    assert vertices(tab, "loss-training") == 4
    # What has not changed is not replaced: nothing flickers, and what was opened stays open.
    assert tab.evaluate("window.same === document.getElementById('data')")
    publish(tmp_path, "train", {}, {"SEED": 43})
    tab.locator("#record", has_text="43").wait_for()
    assert tab.locator("details").first.get_attribute("open") is not None


def test_a_served_page_runs_no_script_of_a_text(tmp_path: Path, watching: Any) -> None:
    publish(tmp_path, "eval", EVAL)
    compare(tmp_path, (HOSTILE, HOSTILE, HOSTILE, HOSTILE))
    watching.wait_for_selector("#answers article")
    assert watching.evaluate("window.ran") is None
    assert watching.locator("script").count() == 1  # its own, which the nonce allows


@pytest.mark.parametrize(
    ("host", "path", "status"),
    [
        ("127.0.0.1:1", "/", 200),
        ("localhost:1", "/", 200),
        ("evil.example:1", "/", 403),
        ("127.0.0.1:1", "/data/manifest.json", 404),
    ],
)
def test_only_the_page_is_served_and_only_to_this_machine(
    port: int, host: str, path: str, status: int
) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("GET", path, headers={"Host": host})
    assert connection.getresponse().status == status
    connection.close()


def test_a_port_that_is_taken_is_said(tmp_path: Path, port: int) -> None:
    with pytest.raises(InputError, match=f"WATCH_PORT={port} of 127.0.0.1 cannot be listened on"):
        server_of(Page(tmp_path, Settings()), port)


def test_watching_ends_with_ctrl_c(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "stages.watch", "--run", str(tmp_path), "--watch-port", port]
    watch = subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(), stdout=subprocess.PIPE, text=True
    )
    assert watch.stdout is not None and f"127.0.0.1:{port} shows" in watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    assert watch.communicate(timeout=10)[0].strip() == "watch: ended"
    assert watch.returncode == 0
    assert not [*tmp_path.iterdir()]  # nothing is written
