"""What the parts of gpu.py share: the device, the sizes, what a part finds, and how it measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import job
import measure
import roofline
from dogvae.config import Config
from dogvae.data.dataset import Dataset
from dogvae.training.step import Trainer


class Part:
    """The device and the sizes of a part, and what it finds. `found` is written to `file` after each change."""

    def __init__(self, device: str, quick: bool, folder: Path, file: Path) -> None:
        self.device, self.quick, self.folder, self.file = torch.device(device), quick, folder, file
        self.cuda = self.device.type == "cuda"
        self.found: dict[str, Any] = {"figures": {}, "lines": [], "checks": []}

    def say(self, name: str, figures: Any, line: str) -> None:
        """Keep the figures under a name, and a line about them for the table."""
        self.found["figures"][name] = figures
        self.found["lines"].append(line)
        self._write()

    def check(self, name: str, ok: bool, detail: str) -> None:
        """Keep whether something that must hold does."""
        self.found["checks"].append({"name": name, "ok": bool(ok), "detail": detail})
        self._write()

    def _write(self) -> None:
        new = self.file.with_suffix(".new")
        new.write_text(json.dumps(self.found))
        new.replace(self.file)

    def config(self, **settings: Any) -> Config:
        """A Config with the presets' widths, or a narrow one for --quick."""
        return Config.make(**({"width": 4} if self.quick else {}), **settings)

    def photos(self, train: int, val: int) -> Dataset:
        """A dataset of drawn dogs."""
        return Dataset(job.write_photos(self.folder / f"{train}-{val}", train, val))

    def peak_mb(self) -> float:
        """Peak memory of the device since `torch.cuda.reset_peak_memory_stats`; on a CPU, of the process."""
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else measure.peak_mb()

    def seconds(self, work: Callable[[], object], rounds: int = 5, round_s: float = 0.3) -> dict[str, float]:
        """Seconds of a call: the summary of rounds of about `round_s` seconds, after a few calls that warm up."""
        for _ in range(2 if self.quick else 5):
            work()
        once = min(roofline.timed(work, self.device, 1))
        calls = 1 if self.quick else max(2, min(200, round(round_s / once)))

        def turn() -> None:
            for _ in range(calls):
                work()

        return measure.summary([s / calls for s in roofline.timed(turn, self.device, rounds)])


def stepping(trainer: Trainer) -> Callable[[], None]:
    """A training step on random images that are on the device; each call is the next step of epochs of 100 steps."""
    n, size = trainer.config.batch_size, trainer.config.model.image_size
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, device=trainer.device)
    numbers = iter(range(10**9))

    def run() -> None:
        epoch, number = divmod(next(numbers), 100)
        trainer.step(images, n, epoch, number, 100)

    return run
