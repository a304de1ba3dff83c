"""The shared export as a loaded model, as a playground and its page, and the images that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dogvae.data.dataset import Dataset
from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from tests.support.browser import CHROMIUM, FLAGS
from tests.support.exports import Exported
from tests.support.playground import Playground, playground
from tests.support.playground_page import Page


@pytest.fixture(scope="module")
def model(exported: Exported) -> DogVAE:
    return load(exported.folder, "cpu")


@pytest.fixture(scope="module")
def dogs(exported: Exported) -> np.ndarray:
    """All training images, (100, 32, 32, 3) uint8."""
    train = Dataset(exported.dataset).train
    return train.gather(np.arange(len(train))).numpy().transpose(0, 2, 3, 1)


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """A playground for tests that do not end it. It may print its address and nothing else."""
    with playground(tmp_path_factory.mktemp("server") / "here", exported.folder) as command:
        command.get()
        yield command
        assert command.text() == f"playground  {command.address}\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not Path(CHROMIUM).exists():
        pytest.skip("chromium is not installed: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, server: Playground) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, accept_downloads=True)
    page = Page(context, server)
    yield page
    assert page.messages == []
    context.close()
