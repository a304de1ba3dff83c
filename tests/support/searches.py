"""Searches as they lie on a disk, made up from a few numbers."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.storage import Storage
from tune.search_folder import Search, open_search
from tune.space import Space

SPACE = {"latent_dim": "choice(8,16,32,64)", "lr": "loguniform(0.0001,0.01)", "samples": "choice(1,3,10)"}


@dataclass
class Spec:
    """A trial to be written: the loss after each epoch, and how long an epoch takes."""

    setting: dict[str, Any]
    losses: list[float | None] = field(default_factory=list)
    epoch_s: float = 10.0
    state: str = "done"
    reason: str = ""


def build(runs: Path, specs: list[Spec], space: dict[str, str] = SPACE, name: str = "dogs") -> Path:
    """Write the folder of a search, as the search itself does; returns it."""
    folder = runs / name
    folder.mkdir(parents=True)
    about = {"format": "dogvae-search", "version": 1, "space": space, "trials": len(specs), "seed": 0}
    trials = []
    for number, spec in enumerate(specs):
        trials.append({"number": number, "name": f"{number:02d}-trial", "setting": spec.setting})
        trials[-1] |= {"state": spec.state, "reason": spec.reason}
        (folder / "trials" / f"{number:02d}-trial").mkdir(parents=True)
        if spec.losses:
            lines = [json.dumps(record(epoch, loss, spec.epoch_s)) + "\n" for epoch, loss in enumerate(spec.losses)]
            (folder / "trials" / f"{number:02d}-trial" / "metrics.jsonl").write_text("".join(lines))
    (folder / "search.json").write_text(json.dumps(about))
    (folder / "trials.json").write_text(json.dumps(trials))
    return folder


def record(epoch: int, loss: float | None, epoch_s: float) -> dict[str, Any]:
    """An epoch whose other numbers follow from the loss."""
    return {
        "epoch": epoch,
        "step": 40 * (epoch + 1),
        "val_loss": loss,
        "val_reconstruction": None if loss is None else loss - 100 - epoch,
        "val_kl": None if loss is None else 100.0 + epoch,
        "val_explained": None if loss is None else (8000 - loss) / 1000,
        "images_per_s": 600 / epoch_s + epoch,
        "seconds": (epoch + 1) * epoch_s,
    }


def setting(latent_dim: int = 32, lr: float = 1e-3, samples: int = 1) -> dict[str, Any]:
    return {"latent_dim": latent_dim, "lr": lr, "samples": samples}


def searched(runs: Path, specs: list[Spec], space: dict[str, str] = SPACE) -> Search:
    build(runs, specs, space)
    return open_search(str(runs), "dogs")


def many(count: int, space: dict[str, str] = SPACE, epochs: int = 12, seed: int = 0) -> list[Spec]:
    """Trials as a search with early stopping leaves them: terrible first epochs, a best learning rate in the middle."""
    rng = np.random.default_rng(seed)
    domains = Space.from_json(space)
    specs = []
    for number in range(count):
        chosen = domains.setting(seed, number)
        last = 7300 + 200 * abs(math.log10(chosen.get("lr", 1e-3) / 1e-3)) + rng.normal(0, 20)
        done = number < 3 or rng.random() < 0.3
        losses = [last + 2500 * math.exp(-epoch / 2) for epoch in range(epochs if done else int(rng.integers(1, 4)))]
        state = "done" if done else "stopped"
        specs.append(Spec(chosen, [*losses], float(rng.uniform(3, 20)), state))
    return specs


class Remote(Storage):
    """A folder that is used as an object store is: by nothing but its methods."""

    def __init__(self, uri: str | Path) -> None:
        super().__init__(uri)
        self.local = None

    def __truediv__(self, name: str) -> Storage:
        return Remote(f"{self.uri}/{name}")
