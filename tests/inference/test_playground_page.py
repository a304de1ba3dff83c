"""The playground's page in Chromium: new dogs, the shelf, photos, walks, litters, and errors."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from dogvae.inference.playground import MOST_BYTES
from tests.support.exports import Exported, with_flow
from tests.support.images import pixels
from tests.support.playground import PHOTOS, playground
from tests.support.playground_page import SAMPLES_SHOWN, Page


def test_new_dogs_follow_button_key_seed_prior_and_temperature(page: Page) -> None:
    first, seed = page.samples(), page.page.input_value("#seed")
    assert len(set(first)) == 12
    assert not page.page.is_visible("#guidance")  # this model has no flow
    for _ in range(100):
        page.press("Tab")
        if page.focused() == "draw":
            break
    page.press("Enter")
    page.until_other_samples(first)
    assert page.page.input_value("#seed") != seed
    page.page.fill("#seed", seed)
    page.until(lambda: page.samples() == first)
    page.press("n")  # typed into the seed
    assert page.page.input_value("#seed") == seed
    page.page.focus("#shift-2")
    page.press("n")
    page.until_other_samples(first)

    second = page.samples()
    page.page.select_option("#prior", "normal")
    page.until_other_samples(second)
    page.page.select_option("#prior", "gaussian")
    page.until(lambda: page.samples() == second)
    page.page.fill("#temperature", "0")
    page.until_other_samples(second)
    assert page.page.inner_text("#temperature-value") == "0.00"
    page.page.fill("#temperature", "1")
    page.until(lambda: page.samples() == second)


def test_flow_has_a_knob_for_its_guidance(browser: Any, exported: Exported, tmp_path: Path) -> None:
    folder = with_flow(exported, tmp_path / "export")
    model = load(folder, "cpu")
    with playground(tmp_path / "here", folder) as server:
        page = Page(browser.new_context(), server)
        seed = int(page.page.input_value("#seed"))
        assert page.page.input_value("#guidance") == "0.5"
        for guidance in (0.5, 2.0, 0.0):
            page.page.fill("#guidance", str(guidance))
            first = model.sample(12, seed, prior="flow", guidance=guidance)[0]
            page.until(lambda first=first: np.array_equal(pixels(page.samples()[0]), first))  # type: ignore[misc]
            assert page.page.inner_text("#guidance-value") == f"{guidance:.2f}"
        page.page.select_option("#prior", "gaussian")
        assert not page.page.is_visible("#guidance")
        page.until(lambda: np.array_equal(pixels(page.samples()[0]), model.sample(1, seed, prior="gaussian")[0]))
        page.page.select_option("#prior", "flow")
        assert page.page.is_visible("#guidance")
        assert page.messages == []
        page.page.context.close()


def test_shelf_keeps_dogs_over_a_reload(page: Page) -> None:
    samples, pins = page.samples(), page.page.locator("#samples .pin")
    page.page.locator("#samples button").nth(2).click()
    page.until(lambda: page.src("#dog") == samples[2])
    page.page.click("#keep")
    assert pins.nth(2).is_checked()
    pins.nth(5).check()
    pins.nth(6).check()
    pins.nth(6).uncheck()
    assert page.sources("#shelf img") == [samples[2], samples[5]]
    page.page.reload()
    page.page.wait_for_selector(SAMPLES_SHOWN)
    assert page.sources("#shelf img") == [samples[2], samples[5]]
    page.page.locator("#shelf .pic").nth(1).click()
    page.until(lambda: page.src("#dog") == samples[5])
    page.page.locator("#shelf button[title=remove]").first.click()
    assert page.sources("#shelf img") == [samples[5]]
    assert page.page.evaluate("document.activeElement.title") == "remove"  # of the next dog, for the keyboard


def test_two_photos_become_a_walk(page: Page, model: DogVAE) -> None:
    files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": photo} for i, photo in enumerate(PHOTOS)]
    opened = page.src("#frame")
    page.page.set_input_files("#photos", files)
    page.until(lambda: page.src("#frame") != opened)
    ends = [model.reconstruct(Image.open(io.BytesIO(photo)))[0] for photo in PHOTOS]
    for slot, end in zip(("#walk-from img", "#walk-to img"), ends, strict=True):
        assert np.array_equal(pixels(page.src(slot)), end)
    assert page.page.locator("#shelf .photo img").count() == 4

    page.page.focus("#walk")
    walks = page.requests.count("walk")
    for key, at, end in (("Home", "0", ends[0]), ("ArrowRight", "1", None), ("End", "32", ends[1])):
        page.press(key)
        assert page.page.input_value("#walk") == at
        assert end is None or np.array_equal(pixels(page.src("#frame")), end)
    page.page.fill("#walk", "16")
    middle = pixels(page.src("#frame"))
    assert not any(np.array_equal(middle, end) for end in ends)
    assert page.requests.count("walk") == walks  # the page has all steps already

    name, animation = page.download("#gif")
    assert name == "walk.gif"
    durations = 0
    for frame in range(animation.n_frames):
        animation.seek(frame)
        durations += animation.info["duration"]
    assert durations == 64 * 50
    assert page.download("#download-frame")[1].size == (512, 512)

    page.page.click("#play")
    page.until(lambda: page.page.input_value("#walk") != "16")
    page.page.click("#play")
    straight = page.src("#frame")
    page.page.select_option("#method", "spherical")
    page.until(lambda: page.src("#frame") != straight)
    assert page.requests.count("walk") == walks + 1
    page.page.click("#take")
    assert page.src("#dog") == page.src("#frame")


def test_two_dogs_have_litters(page: Page) -> None:
    """Of new dogs and of photos; a child can become your dog, and be kept."""

    def litter() -> list[str]:
        return page.sources("#litter img")

    opened = litter()
    page.page.click("#use-from")
    page.page.locator("#samples .pic").nth(3).click()
    page.page.click("#use-to")
    page.until(lambda: not set(opened) & set(litter()))
    first = litter()
    assert len(set(first)) == 12
    page.page.click("#again")
    page.until(lambda: not set(first) & set(litter()))
    child = litter()[4]
    page.page.locator("#litter .pic").nth(4).click()
    page.until(lambda: page.src("#dog") == child)
    assert page.status() == "Child 5 is your dog now."
    page.page.locator("#litter .pin").nth(6).check()
    assert page.sources("#shelf img") == [litter()[6]]

    before, requests = litter(), page.requests.count("litter")
    assert requests >= 3
    files = [{"name": f"{i}.png", "mimeType": "image/png", "buffer": photo} for i, photo in enumerate(PHOTOS)]
    page.page.set_input_files("#photos", files)
    page.until(lambda: page.page.locator("#shelf .photo").count() == 2 and not set(before) & set(litter()))
    assert page.requests.count("litter") > requests


def test_ends_of_the_walk_are_chosen_by_clicks(page: Page) -> None:
    samples = page.samples()
    page.page.click("#walk-from")
    page.press("Escape")
    page.page.click("#walk-from")
    page.page.locator("#samples button").nth(8).click()
    page.page.click("#use-to")
    assert page.src("#walk-from img") == samples[8]
    page.page.wait_for_selector("#frame[src]")
    page.page.fill("#walk", "0")
    page.until(lambda: page.src("#frame") == samples[8])
    page.page.fill("#walk", "32")
    page.until(lambda: page.src("#frame") == page.src("#dog"))


def test_files_that_are_not_photos_are_named_and_photos_are_taken(page: Page, model: DogVAE, tmp_path: Path) -> None:
    """Also a file whose name is HTML."""
    name = "<img src=x onerror=alert(1)>.txt"
    for file, content in ((name, b"a text"), ("dog.png", PHOTOS[0]), ("large.jpg", bytes(MOST_BYTES + 1))):
        (tmp_path / file).write_bytes(content)
    page.page.set_input_files("#photos", [tmp_path / file for file in (name, "dog.png", "large.jpg")])
    page.until(lambda: "larger than 20 MB" in page.status())
    assert f"{name}: this photo cannot be used: " in page.status()
    assert np.array_equal(pixels(page.src("#walk-from img")), model.reconstruct(Image.open(io.BytesIO(PHOTOS[0])))[0])
    assert page.requests.count("photo") == 2  # the large one is not sent
    before = page.samples()
    page.page.click("#draw")
    page.until_other_samples(before)
    # Chromium itself writes a line about the server's answer of 400.
    page.messages = [line for line in page.messages if "responded with a status of 400" not in line]


def test_dropped_photo_is_added(page: Page, model: DogVAE) -> None:
    script = """(data) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "dropped.png", { type: "image/png" }));
        return transfer;
    }"""
    transfer = page.page.evaluate_handle(script, base64.b64encode(PHOTOS[1]).decode())
    for event in ("dragover", "drop"):
        page.page.dispatch_event("h1", event, {"dataTransfer": transfer})
    page.page.wait_for_selector("#shelf .photo")
    assert np.array_equal(pixels(page.src("#walk-from img")), model.reconstruct(Image.open(io.BytesIO(PHOTOS[1])))[0])


def test_server_errors_are_shown_and_the_page_goes_on(page: Page) -> None:
    before = page.samples()
    answer = {"status": 500, "content_type": "application/json", "body": '{"error": "out of memory"}'}
    page.page.route("**/api/sample", lambda route: route.fulfill(**answer))
    page.page.click("#draw")
    page.until(lambda: page.status() == "out of memory")
    assert page.samples() == before
    page.page.unroute("**/api/sample")
    page.page.route("**/api/move", lambda route: route.abort())
    page.page.focus("#shift-0")
    page.press("ArrowRight")
    page.until(lambda: "does not answer" in page.status())
    page.page.unroute("**/api/move")
    before_move = page.src("#dog")
    page.press("ArrowRight")
    page.until(lambda: page.src("#dog") != before_move)
    page.page.click("#draw")
    page.until_other_samples(before)
    page.messages = [line for line in page.messages if "Failed to load resource" not in line]
