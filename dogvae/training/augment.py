"""Batched augmentation on the device, as in the notebook: horizontal flips and small rotations.

The random draws are made for the global batch from (seed, epoch, step), and each rank takes its slice. So the images
do not depend on the number of workers.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dogvae import rng
from dogvae.rng import Stream

FLIP_P = 0.5
ROTATE_P = 0.3
MAX_DEGREES = 10.0


def draws(n: int, seed: int, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """For a global batch of `n` images: which to flip, (n,) bool, and their rotations in degrees, (n,) float32.

    0 degrees is no rotation; positive angles are counter-clockwise.
    """
    u = rng.words(3 * n, Stream.AUGMENTATION, seed, epoch, step).reshape(3, n) / 2.0**64
    flip = u[0] < FLIP_P
    degrees = np.where(u[1] < ROTATE_P, (2 * u[2] - 1) * MAX_DEGREES, 0.0)
    return flip, degrees.astype(np.float32)


def augment(x_bchw: Tensor, flip_b: Tensor, degrees_b: Tensor) -> Tensor:
    """Flip images (b, 3, h, h) in [0, 1], then rotate each by its `degrees_b` about its centre.

    Bilinear; the border is reflected, so that corners do not turn black. Images that are not rotated keep their exact
    values. `flip_b` and `degrees_b` are in host memory: a GPU gets them without being waited for.
    """
    if len(x_bchw) == 0:  # the last batch may leave a rank without images, which grid_sample refuses
        return x_bchw
    radians = degrees_b * (math.pi / 180)
    cos, sin = torch.cos(radians), torch.sin(radians)
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1)  # (b, 2, 2)
    flip, turned, turn = (_moved(t, x_bchw.device) for t in (flip_b, degrees_b != 0, turn))
    x = torch.where(flip[:, None, None, None], x_bchw.flip(3), x_bchw)
    grid = (_places(x.shape[2], x.device) @ turn.mT).unflatten(1, x.shape[2:])
    rotated = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return torch.where(turned[:, None, None, None], rotated, x)


@cache
def _places(side: int, device: torch.device) -> Tensor:
    """Places (1, side * side, 2) of the pixels of a square image, as `affine_grid` has them: from -1 to 1, x first."""
    still = torch.eye(2, 3, device=device)[None]
    return F.affine_grid(still, [1, 1, side, side], align_corners=False).flatten(1, 2)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """A tensor of host memory on the device. From pinned memory the copy does not make the host wait."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t
