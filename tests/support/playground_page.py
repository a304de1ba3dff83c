"""The playground's page in Chromium: what it shows, requests and prints."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from tests.support.playground import Playground

SAMPLES_SHOWN = "#samples .tile:nth-child(12) img[src^=data]"


class Page:
    """The page in a context of its own, with its requests to the server and the messages on its console."""

    def __init__(self, context: Any, server: Playground) -> None:
        self.address, self.server = server.address, server
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.moving = self.most_moving = 0  # requests to /api/move in flight
        self.page = context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", self._request)
        self.page.on("requestfinished", self._finished)
        self.page.on("requestfailed", self._finished)
        self.page.goto(self.address)
        self.page.wait_for_selector(SAMPLES_SHOWN)
        self.page.wait_for_selector("main:not([inert])")

    def _request(self, request: Any) -> None:
        assert request.url.startswith((self.address, "data:", "blob:")), request.url
        self.requests += re.findall("/api/(.*)", request.url)
        self.moving += request.url.endswith("/api/move")
        self.most_moving = max(self.most_moving, self.moving)

    def _finished(self, request: Any) -> None:
        self.moving -= request.url.endswith("/api/move")

    def src(self, selector: str) -> str:
        return str(self.page.get_attribute(selector, "src"))

    def sources(self, selector: str) -> list[str]:
        return [str(image.get_attribute("src")) for image in self.page.locator(selector).all()]

    def samples(self) -> list[str]:
        return self.sources("#samples img")

    def until(self, condition: Callable[[], object], seconds: float = 20) -> None:
        """Playwright's own waiting for a condition needs eval, which the page's policy forbids."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            self.page.wait_for_timeout(30)

    def until_other_samples(self, before: list[str]) -> None:
        self.until(lambda: not set(before) & set(self.samples()))

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def download(self, selector: str) -> tuple[str, Image.Image]:
        """The name and the picture that a click on a button saves."""
        with self.page.expect_download() as download:
            self.page.click(selector)
        return download.value.suggested_filename, Image.open(download.value.path())

    def status(self) -> str:
        return str(self.page.inner_text("#status"))

    def focused(self) -> str:
        return str(self.page.evaluate("document.activeElement.id"))

    def ends(self, slider: int) -> list[str]:
        """The pictures at the two ends of a slider, once they are those of the page's dog."""
        row = f".direction:has(#shift-{slider})"
        self.page.wait_for_selector(f"{row}:not(.stale)", state="attached")
        return self.sources(f"{row} img")

    def moved(self, shifts: list[float]) -> str:
        """The server's picture of the page's dog, moved."""
        latent = self.page.evaluate("base.latent")
        return str(self.server.post("move", json={"latent": latent, "shifts": shifts}).json()["picture"])
