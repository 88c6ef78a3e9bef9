"""Take the pictures of docs/report.md, with Debian's chromium:

python -m tests.page.picture outputs/demo/report.html docs/images
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZE = {"width": 1100, "height": 1330}


def main(page: Path, folder: Path) -> None:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for scheme in ("light", "dark"):
            tab = chromium.new_page(viewport=SIZE, color_scheme=scheme)
            tab.goto(page.resolve().as_uri())
            tab.screenshot(path=folder / f"report-{scheme}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
