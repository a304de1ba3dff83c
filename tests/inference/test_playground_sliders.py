"""The playground's sliders in Chromium: they move the dog, show where they lead, and can be renamed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.playground import Playground
from tests.support.playground_page import Page


def test_sliders_move_the_dog_and_buttons_reset_it(page: Page) -> None:
    """By keyboard: the picture is that of the slider's last value."""
    first = page.src("#dog")
    assert first == page.sources("#litter img")[0]
    page.page.focus("#shift-0")
    page.press(*["ArrowRight"] * 7)
    assert page.page.input_value("#shift-0") == "0.7"
    moved = page.moved([0.7, *[0.0] * 11])
    page.until(lambda: page.src("#dog") == moved)
    assert moved != first

    page.press("Tab", "Enter")  # the button beside the slider, which says 0.7
    page.until(lambda: page.src("#dog") == first)
    assert (page.focused(), page.page.input_value("#shift-0")) == ("shift-0", "0")

    page.page.get_by_text("4 more").click()
    page.page.fill("#shift-11", "-3")
    page.page.fill("#shift-1", "3")
    page.until(lambda: page.src("#dog") != first)
    page.page.click("#reset")
    page.until(lambda: page.src("#dog") == first)
    name, picture = page.download("#download")
    assert (name, picture.size) == ("dog.png", (512, 512))


def test_dragging_a_slider_sends_one_request_at_a_time(page: Page) -> None:
    """However fast the mouse is; the last picture is that of the last value."""
    box = page.page.locator("#shift-0").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.page.mouse.move(x, y)
    page.page.mouse.down()
    page.page.mouse.move(x + box["width"] / 3, y, steps=50)
    page.page.mouse.up()
    shift = float(page.page.input_value("#shift-0"))
    assert shift > 1.5
    moved = page.moved([shift, *[0.0] * 11])
    page.until(lambda: page.src("#dog") == moved)
    assert 1 <= page.requests.count("move") <= 50
    assert page.most_moving == 1


def test_ends_of_a_slider_show_the_dog_that_it_would_become(page: Page) -> None:
    """With the other sliders as they are; the sliders that are folded away get their pictures when they are opened."""
    rest = [0.0] * 12
    for i in (0, 7):
        assert page.ends(i) == [page.moved([*rest[:i], end, *rest[i + 1 :]]) for end in (-3.0, 3.0)]
    first = page.ends(0)
    page.page.locator("#litter .pic").nth(5).click()
    page.until(lambda: page.ends(0) != first)
    assert page.ends(0) == [page.moved([end, *rest[1:]]) for end in (-3.0, 3.0)]

    page.ends(7)  # the last of those that are drawn
    own, requests = page.ends(2), page.requests.count("ends")
    page.page.fill("#shift-2", "1.5")
    assert page.ends(0) == [page.moved([end, 0, 1.5, *rest[3:]]) for end in (-3.0, 3.0)]
    page.ends(7)
    assert page.ends(2) == own
    assert page.requests.count("ends") == requests + 7  # a slider's own value does not change its ends
    assert page.sources("#more img") == [""] * 8
    page.page.get_by_text("4 more").click()
    assert page.ends(11) == [page.moved([0, 0, 1.5, *rest[3:11], end]) for end in (-3.0, 3.0)]


def test_slider_does_not_wait_for_the_pictures_at_the_ends(page: Page) -> None:
    """A slider that moves stops their drawing. At most one request for them is in flight."""
    page.ends(7)
    held: list[Any] = []
    page.page.route("**/api/ends", lambda route: held.append(route))
    page.page.fill("#shift-0", "1")
    page.until(lambda: held)
    page.page.fill("#shift-0", "2")
    moved = page.moved([2.0, *[0.0] * 11])
    page.until(lambda: page.src("#dog") == moved)
    assert len(held) == 1
    stale = page.sources(".direction:has(#shift-1) img")
    page.until(lambda: len(held) == 2)  # of the new value
    held[0].continue_()
    page.page.wait_for_timeout(300)
    assert len(held) == 2
    assert page.sources(".direction:has(#shift-1) img") == stale
    held[1].continue_()
    page.page.unroute("**/api/ends")
    assert page.ends(1) == [page.moved([2.0, end, *[0.0] * 10]) for end in (-3.0, 3.0)]


NAME = "<b>ears & nose</b>"


def names(page: Page) -> list[str]:
    return [str(name) for name in page.page.locator(".direction label").all_text_contents()]


def test_direction_is_renamed_and_keeps_its_name(page: Page) -> None:
    """By a double click, and by keyboard: Enter keeps the name, Escape the old one, and an empty field resets it."""
    own = [f"direction {i}" for i in range(1, 13)]
    samples = page.samples()
    page.page.get_by_text("direction 2", exact=True).dblclick()
    page.page.keyboard.type(NAME)
    page.press("Enter")
    assert names(page) == [own[0], NAME, *own[2:]]
    assert page.page.get_by_label(NAME, exact=True).get_attribute("id") == "shift-1"
    assert "empty its name" in page.status()
    assert page.samples() == samples  # the letter n draws others elsewhere

    page.page.reload()
    page.page.wait_for_selector("main:not([inert])")
    assert names(page) == [own[0], NAME, *own[2:]]
    page.page.focus("#shift-0")
    page.press("Shift+Tab", "Enter")  # the pencil before the slider
    page.page.keyboard.type("fur")
    page.press("Escape")
    assert names(page)[0] == own[0]
    assert page.page.evaluate("document.activeElement.ariaLabel") == "direction 1: rename"
    page.press("Enter")
    page.page.keyboard.type("fur")
    page.page.click("#yours-title")  # a click elsewhere keeps the name, as Enter does
    assert names(page)[:2] == ["fur", NAME]
    page.page.click("#reset")  # of the sliders, not of their names
    page.page.get_by_text(NAME, exact=True).dblclick()
    page.press("Delete", "Enter")
    assert names(page) == ["fur", *own[1:]]
    assert page.status() == "Direction 2 has its own name again."


def test_names_belong_to_the_directions_of_one_model(page: Page) -> None:
    """A run of the same name that is trained again has other directions."""
    page.page.evaluate('localStorage.setItem(namesKey, \'{"0": "fur"}\')')
    page.page.reload()
    page.page.wait_for_selector("main:not([inert])")
    assert names(page)[0] == "fur"

    def other_model(route: Any) -> None:
        answer = route.fetch()
        route.fulfill(response=answer, body=json.dumps({**answer.json(), "directions_id": "0" * 16}))

    page.page.route("**/api/about", other_model)
    page.page.reload()
    page.page.wait_for_selector("main:not([inert])")
    assert names(page)[0] == "direction 1"


@pytest.mark.parametrize("width", [390, 360])
def test_direction_is_renamed_on_a_touch_screen(browser: Any, server: Playground, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 740}, is_mobile=True, has_touch=True)
    page = Page(context, server)
    page.page.locator(".rename").nth(4).tap()
    page.page.keyboard.type("background")
    page.page.get_by_text("Your dog", exact=True).tap()
    assert names(page)[4] == "background"
    assert page.messages == []
    context.close()
