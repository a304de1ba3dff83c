"""The playground's layout in Chromium: phones, touch screens, messages, and the sentence under the title."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.playground import PHOTOS, Playground
from tests.support.playground_page import Page

# The controls whose middle something else covers when they are scrolled into sight, or that nothing scrolls into sight.
COVERED = """() => [...document.querySelectorAll('#page :is(button, select, input, summary, .button)')].filter(e => {
  if (e.type === 'file' || !e.checkVisibility() || e.disabled) return false;
  e.scrollIntoView({ block: 'end' });
  const { left, right, top, bottom } = e.getBoundingClientRect();
  return !e.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
}).map(e => e.outerHTML)"""
OUTSIDE = """() => [...document.querySelectorAll('#page *')].filter(e => {
  const { left, right } = e.getBoundingClientRect();
  return e.type !== 'file' && (left < 0 || right > innerWidth);
}).map(e => e.outerHTML)"""


def phone(browser: Any, server: Playground, width: int, **options: Any) -> Page:
    size = {"width": width, "height": 844 if width == 390 else 640}
    return Page(browser.new_context(viewport=size, is_mobile=True, has_touch=True, **options), server)


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (360, "dark")])
def test_phone_layout_is_whole(browser: Any, server: Playground, width: int, scheme: str) -> None:
    """With everything open and in use: no sideways scrolling, nothing cut, and every control can be reached."""
    page = phone(browser, server, width, color_scheme=scheme)
    files = [{"name": "a" * 120 + ".png", "mimeType": "image/png", "buffer": photo} for photo in PHOTOS]
    page.page.set_input_files("#photos", files)
    page.page.wait_for_selector("#shelf .photo:nth-child(2)")
    page.page.wait_for_selector("#litter .tile:nth-child(12)")
    page.page.get_by_text("4 more").tap()
    page.page.locator(".rename").nth(1).tap()
    page.page.keyboard.type("a name of 40 letters, which is too long.")
    page.press("Enter")
    page.page.fill("#shift-1", "-2.5")
    page.page.locator("#samples button").first.tap()
    page.page.wait_for_selector("#status:empty", state="attached")
    assert (
        page.page.evaluate("[innerWidth, document.documentElement.scrollWidth, $('page').scrollWidth]") == [width] * 3
    )
    assert page.page.evaluate(OUTSIDE) == []
    assert page.page.evaluate(COVERED) == []
    page.page.evaluate("$('page').scrollTo(0, 0)")
    with_shadow = page.page.locator("#reset").screenshot()
    page.page.add_style_tag(content="#yours .screen { box-shadow: none !important }")
    assert page.page.locator("#reset").screenshot() == with_shadow  # the dog's shadow does not cut it
    assert page.messages == []
    page.page.context.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_message_covers_nothing(browser: Any, server: Playground, width: int) -> None:
    """The page ends where the message begins, and all of it can still be scrolled into sight."""
    if width == 390:
        page = phone(browser, server, width)
    else:
        page = Page(browser.new_context(viewport={"width": width, "height": 900}), server)
    heights = "[$('page').getBoundingClientRect().bottom, $('status').getBoundingClientRect().top, innerHeight]"
    for cause, message in (
        (lambda: page.page.locator("#litter .pin").nth(11).check(), "On the shelf."),
        (lambda: page.page.click("#walk-from"), "Choose the dog"),
        (lambda: page.page.set_input_files("#photos", [bad(i) for i in range(4)]), "3.jpg: this photo"),
    ):
        cause()
        page.until(lambda message=message: message in page.status())  # type: ignore[misc]
        end, top, height = page.page.evaluate(heights)
        assert end <= top < height
        assert page.page.evaluate(COVERED) == []
        assert message in page.status()
    page.page.context.close()


def bad(i: int) -> dict[str, Any]:
    return {"name": f"{i}.jpg", "mimeType": "image/jpeg", "buffer": b"no photo"}


def test_hints_for_keys_and_mouse_are_hidden_on_touch_screens(browser: Any, server: Playground, page: Page) -> None:
    hints = page.page.locator("kbd, .mouse")
    assert [hint.is_visible() for hint in hints.all()] == [True, True]
    touch = phone(browser, server, 390)
    assert [hint.is_visible() for hint in touch.page.locator("kbd, .mouse").all()] == [False, False]
    touch.page.context.close()


def test_sentence_under_the_title_has_no_technical_words(page: Page) -> None:
    sentence = page.page.inner_text("#about")
    assert "“dogs”" in sentence
    assert not re.search("VAE|latent|pixel|number|model|prior|encode|vector|direction", sentence)
