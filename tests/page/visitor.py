"""Somebody with a browser: what they do on the page, and what they must never meet there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.service.processes import PATIENCE

Scheme = Literal["light", "dark"]
WIDE = {"width": 1280, "height": 900}
NARROW = {"width": 360, "height": 740}
RULES: dict[Scheme, list[str]] = {
    "light": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
    # What depends on colours.
    "dark": ["color-contrast", "link-in-text-block"],
}
SERIOUS = ("serious", "critical")
REMEMBER = """
window.said = [];
addEventListener("DOMContentLoaded", () => new MutationObserver(() => {
  window.said.push(document.getElementById("draw-state").textContent);
}).observe(document.getElementById("draw-state"), {childList: true}));
"""
expect.set_options(timeout=1000 * PATIENCE)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium, without windows."""
    path = shutil.which("chromium")
    assert path is not None, "these tests need Chromium: `make tools` installs it on Debian"
    # Its sandbox refuses to work for root, as in CI.
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=flags)
        try:
            yield browser
        finally:
            browser.close()


class Visitor:
    """One tab on a service, which remembers errors and where requests went."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.url, self.context = url, context
        self.problems: list[str] = []
        self.may_lose_service = False
        self.page: Page = context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.add_init_script(REMEMBER)
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.problems.append(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._watch(request.url))
        self.page.goto(url)

    def _hear(self, message: Any) -> None:
        # Chromium itself tells of every answer from 400 on; what the page makes of them is what is tested.
        told = message.text.startswith("Failed to load resource: the server responded with a status of")
        told |= self.may_lose_service and message.text.startswith("Failed to load resource: net::ERR_")
        if message.type in ("error", "warning") and not told:
            self.problems.append(f"{message.type}: {message.text}")

    def _watch(self, url: str) -> None:
        if not url.startswith((self.url + "/", "data:", f"blob:{self.url}/")):
            self.problems.append(f"a request left for {url}")

    def __getitem__(self, selector: str) -> Locator:
        return self.page.locator(selector)

    def says(self, place: str, text: Any) -> None:
        """Wait until a place says something."""
        expect(self[place]).to_contain_text(text)

    @property
    def said(self) -> list[str]:
        """All that the drawing panel has said."""
        said: list[str] = self.page.evaluate("window.said")
        return said

    def is_ready(self) -> Visitor:
        """Wait until there is a model to work with, and what is normal for it is known."""
        expect(self["#model"]).to_be_enabled()
        expect(self["#calibration-note"]).not_to_be_empty()
        return self

    def choose_model(self, name: str) -> None:
        """Choose another model, and wait for what is known of it."""
        with self.page.expect_response(lambda response: "/v1/calibrations" in response.url):
            self["#model"].select_option(name)
        expect(self["#calibration-note"]).not_to_be_empty()

    def wish(self, *, label: str | None = None, count: int = 1, seed: int | None = None) -> None:
        """Fill in what to draw."""
        if label is not None:
            self["#class"].select_option(label=label)
        self["#count"].select_option(str(count))
        if seed is not None:
            self["#seed"].fill(str(seed))

    def draw(self, **wish: Any) -> None:
        """Draw, and wait for the images."""
        self.wish(**wish)
        self["#draw-go"].click()
        expect(self["#draw-facts"]).to_be_visible()

    def upload(self, data: bytes, name: str = "upload.png", kind: str = "image/png") -> None:
        """Choose a file to judge."""
        self["#file"].set_input_files({"name": name, "mimeType": kind, "buffer": data})

    def is_judged(self) -> None:
        """Wait for a verdict."""
        expect(self["#verdict"]).to_be_visible()
        expect(self["#verdict"]).not_to_have_attribute("aria-busy", "true")

    def faults(self) -> list[str]:
        """What axe finds serious, in light and in dark colours."""
        found = []
        for scheme, rules in RULES.items():
            self.page.emulate_media(color_scheme=scheme)
            for fault in Axe().run(self.page, options={"runOnly": rules}).response["violations"]:
                targets = [(node["target"], node["failureSummary"]) for node in fault["nodes"]]
                if fault["impact"] in SERIOUS:
                    found.append(f"{scheme}: {fault['id']}: {targets}")
        return found

    def overflow(self) -> int:
        """Pixels that the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))

    def picture(self, path: Path, **options: Any) -> None:
        """Keep what is seen."""
        self.page.screenshot(path=path, **options)
