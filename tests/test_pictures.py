"""Grids, animations and files of pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dogvae import pictures
from dogvae.errors import UsageError
from tests.support.animations import frames_of


def test_grid_places_images_row_by_row() -> None:
    images = np.arange(3 * 1 * 2 * 3, dtype=np.uint8).reshape(3, 1, 2, 3)
    sheet = pictures.grid(images, columns=2, gap=1)
    assert sheet.shape == (5, 7, 3)
    expected = np.full((5, 7, 3), 255, np.uint8)
    expected[1, 1:3], expected[1, 4:6], expected[3, 1:3] = images[0, 0], images[1, 0], images[2, 0]
    assert np.array_equal(sheet, expected)
    # Fewer images than columns leave no empty columns.
    assert pictures.grid(images, columns=8, gap=1).shape == (3, 10, 3)
    assert pictures.grid(images, columns=0, gap=1).shape == (7, 4, 3)


def test_to_uint8_rounds_and_clips() -> None:
    values = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 0.25, 1.0, 1.5])
    assert pictures.to_uint8(values).tolist() == [0, 0, 0, 1, 64, 255, 255]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4", ".GIF", ".Mp4"])
@pytest.mark.parametrize("n", [2, 3, 6])
def test_animation_runs_forwards_and_backwards(suffix: str, n: int, tmp_path: Path) -> None:
    """Enlarged 4 times, 20 frames a second; the first and last frame are shown once per loop."""
    levels = np.linspace(20, 230, n).astype(np.uint8)
    path = tmp_path / f"walk{suffix}"
    pictures.check_output(path, 1)
    pictures.save(path, np.repeat(levels, 16 * 16 * 3).reshape(n, 16, 16, 3), columns=8)
    frames, seconds = frames_of(path)
    assert frames.shape == (2 * n - 2, 64, 64, 3)
    assert seconds == pytest.approx(1 / 20)
    expected = np.concatenate([levels, levels[-2:0:-1]])
    assert frames.mean(axis=(1, 2, 3)) == pytest.approx(expected, abs=4)  # lossy
    assert frames.std(axis=(1, 2)).max() < 3


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_animation_keeps_places_and_colours(suffix: str, tmp_path: Path) -> None:
    images = np.zeros((2, 16, 16, 3), np.uint8)
    images[0, :8, :8], images[1, 8:, 8:] = (250, 10, 10), (10, 10, 250)
    pictures.save(tmp_path / f"x{suffix}", images, columns=1)
    frames, _ = frames_of(tmp_path / f"x{suffix}")
    top_left, bottom_right = (slice(6, 26), slice(6, 26)), (slice(38, 58), slice(38, 58))
    assert frames[0][top_left].reshape(-1, 3).mean(axis=0) == pytest.approx([250, 10, 10], abs=16)
    assert frames[1][bottom_right].reshape(-1, 3).mean(axis=0) == pytest.approx([10, 10, 250], abs=16)
    assert frames[0][bottom_right].max() < 16
    assert frames[1][top_left].max() < 16


def test_mp4_without_its_package_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install 'dogvae\[video\]'; or use \.gif"):
        pictures.check_output(tmp_path / "walk.mp4", 1)
    pictures.check_output(tmp_path / "walk.gif", 1)


def test_too_many_pictures_for_a_grid_are_refused_but_fit_an_array(tmp_path: Path) -> None:
    black = np.zeros((20_000, 1, 1, 3), np.uint8)
    for suffix in (".png", ".gif", ".webp", ".mp4"):
        reason = f"-o: 20,000 pictures are too many for {suffix}, at most 10,000; use .npy"
        with pytest.raises(UsageError, match=reason):
            pictures.save(tmp_path / f"x{suffix}", black, columns=8)
    assert not list(tmp_path.iterdir())
    pictures.save(tmp_path / "x.npy", black, columns=8)
    assert np.load(tmp_path / "x.npy").shape == black.shape
