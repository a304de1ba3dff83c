"""What each setting may be, written down a second time: its type, valid values, and values out of range."""

from __future__ import annotations

from typing import Any

SETTINGS: dict[str, tuple[type, list[Any], list[Any]]] = {
    "architecture": (str, ["default", "notebook"], ["resnet", "", "Default"]),
    "image_size": (int, [32, 64, 96, 128, 256], [0, 48, 63, 288, -64]),
    "width": (int, [4, 64, 512], [3, 0, -64, 513]),
    "latent_dim": (int, [1, 32, 1024], [0, -1, 1025]),
    "latent_size": (int, [4, 8, 16], [0, 2, 5, 32, -8]),
    "likelihood": (str, ["gaussian", "bernoulli"], ["poisson", "continuous-bernoulli"]),
    "data": (str, ["", "s3://bucket/dogs"], []),
    "fingerprint": (str, ["", "ab12"], []),
    "preset": (str, ["default", "notebook", "small"], ["large", ""]),
    "epochs": (int, [0, 1, 10**6], [-1, -5]),
    "batch_size": (int, [0, 1, 4096], [-1, -32]),
    "lr": (float, [1e-8, 2e-3, 1.0], [0.0, -1e-3, 1.001]),
    "schedule": (str, ["cosine", "constant"], ["linear"]),
    "lr_warmup": (float, [0.0, 2.5], [-0.1]),
    "samples": (int, [1, 1000], [0, 1001]),
    "beta": (float, [0.0, 4.0], [-1e-9]),
    "kl_warmup": (float, [0.0, 10.0], [-1.0]),
    "grad_clip": (float, [0.0, 5.0], [-0.5]),
    "ema": (float, [0.0, 0.995, 0.999999], [-0.1, 0.9999999, 1.0]),
    "augment": (bool, [True, False], []),
    "loss_scale": (str, ["image", "notebook"], ["pixel"]),
    "precision": (str, ["auto", "bf16", "fp32"], ["fp16"]),
    "seed": (int, [0, 2**32 - 1], [-1, 2**32]),
}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")
