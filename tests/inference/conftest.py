"""The shared export as a loaded model and as a playground, and the images that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from dogvae.data.dataset import Dataset
from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from tests.support.exports import Exported
from tests.support.playground import Playground, playground


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
