"""Batched augmentation on the device, as in the notebook: horizontal flips and small rotations.

The random draws are made for the global batch from (seed, epoch, step), and each rank takes its slice. So the images
do not depend on the number of workers.
"""

from __future__ import annotations

import math

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
    values.
    """
    if len(x_bchw) == 0:  # the last batch may leave a rank without images, which affine_grid refuses
        return x_bchw
    x = torch.where(flip_b[:, None, None, None], x_bchw.flip(3), x_bchw)
    radians = degrees_b * (math.pi / 180)
    cos, sin, zero = torch.cos(radians), torch.sin(radians), torch.zeros_like(radians)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    turned = F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return torch.where((degrees_b != 0)[:, None, None, None], turned, x)
