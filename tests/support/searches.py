"""Searches on a disk, written from a few numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dogvae.config import Config
from dogvae.storage import Storage
from dogvae.training.run_folder import save_config
from tune.search_folder import Entry, Search, SearchPlan, open_search, save
from tune.space import Domain, Space
from tune.trial import name_of

SPACE = {"latent_dim": "choice(8,16,32,64)", "lr": "loguniform(0.0001,0.01)", "samples": "choice(1,3,10)"}
MIXED = Space.parse(  # every kind of domain, and every type of value
    ["beta=uniform(0.5,4)", "batch_size=randint(8,64)", "augment=choice(true,false)",
     "likelihood=choice(gaussian,bernoulli)", "schedule=choice(cosine,constant)", "ema=choice(0,0.9,0.99)"], {},
)  # fmt: skip
EPOCHS = 8
PLAN = SearchPlan(
    space=Space.from_json(SPACE), config=Config.make(preset="small", epochs=EPOCHS, data="dogs"), trials=6,
    searcher="random", scheduler="asha", seed=3, workers=1, cpus=1, gpus=0.0,
)  # fmt: skip


@dataclass
class Spec:
    """A trial to write: its settings, its loss after each epoch, and the seconds of an epoch."""

    setting: dict[str, Any]
    losses: Sequence[float | None] = field(default_factory=list)
    epoch_s: float = 10.0
    state: str = "done"
    reason: str = ""


def setting(latent_dim: int = 32, lr: float = 1e-3, samples: int = 10) -> dict[str, Any]:
    """Settings of a trial in SPACE; by default the notebook's."""
    return {"latent_dim": latent_dim, "lr": lr, "samples": samples}


FIVE = [  # one trial of each kind
    Spec(setting(8, samples=1), [7900.0, 7600.0, 7500.0], 10.0),
    Spec(setting(16, samples=3), [7950.0, None, 7450.0], 20.0),
    Spec(setting(32, lr=0.002, samples=1), [8000.0], 4.0, "stopped"),
    Spec(setting(64, samples=1), [], 1.0, "running"),
    Spec(setting(64, lr=0.01, samples=1), [7000.0, None], 5.0, "failed", "epoch 3: the gradients were not finite"),
]


def entry(number: int, state: str = "waiting", reason: str = "", **changes: Any) -> Entry:
    """A trial with the notebook's settings and these changes."""
    chosen = {**setting(), **changes}
    return Entry(number, name_of(number, chosen), chosen, state, reason)


def record(epoch: int, loss: float | None, epoch_s: float = 10.0) -> dict[str, Any]:
    """A line of metrics.jsonl. All numbers follow from the arguments."""
    return {
        "epoch": epoch,
        "step": 10 * (epoch + 1),
        "val_loss": loss,
        "val_reconstruction": None if loss is None else loss - 100 - epoch,
        "val_kl": None if loss is None else 100.0 + epoch,
        "val_explained": None if loss is None else (8000 - loss) / 1000,
        "images_per_s": 600 / epoch_s + epoch,
        "seconds": (epoch + 1) * epoch_s,
    }


def write_search(runs: Path, specs: Sequence[Spec], plan: SearchPlan = PLAN, name: str = "dogs") -> Path:
    """Write the folder of a search, numbering its trials from 0; returns the folder."""
    storage = Storage(runs / name)
    named = [(name_of(number, spec.setting), spec) for number, spec in enumerate(specs)]
    save(storage, plan, [Entry(n, name, s.setting, s.state, s.reason) for n, (name, s) in enumerate(named)])
    for trial_name, spec in named:
        folder = storage / f"trials/{trial_name}"
        if spec.losses:
            lines = [json.dumps(record(epoch, loss, spec.epoch_s)) + "\n" for epoch, loss in enumerate(spec.losses)]
            folder.write("metrics.jsonl", "".join(lines).encode())
            save_config(folder, plan.config.replace(**spec.setting))
    return runs / name


def searched(runs: Path, specs: Sequence[Spec], space: dict[str, str] = SPACE) -> Search:
    """Write a search in `space`, and open it."""
    write_search(runs, specs, replace(PLAN, space=Space.from_json(space)))
    return open_search(str(runs), "dogs")


def many(count: int, space: dict[str, str] = SPACE, epochs: int = 12, seed: int = 0) -> list[Spec]:
    """Trials of a search with early stopping: terrible first epochs, and a best learning rate in the middle."""
    rng = np.random.default_rng(seed)
    domains = Space.from_json(space)
    specs = []
    for number in range(count):
        chosen = domains.setting(seed, number)
        last = 7300 + 200 * abs(math.log10(chosen.get("lr", 1e-3) / 1e-3)) + rng.normal(0, 20)
        done = number < 3 or rng.random() < 0.3
        losses = [last + 2500 * math.exp(-epoch / 2) for epoch in range(epochs if done else int(rng.integers(1, 4)))]
        specs.append(Spec(chosen, losses, float(rng.uniform(3, 20)), "done" if done else "stopped"))
    return specs


def contains(domain: Domain, value: Any) -> bool:
    """Whether a domain contains a value, in the domain's own type."""
    if type(value) is not type(domain.values[0]):
        return False
    return value in domain.values if domain.kind == "choice" else domain.values[0] <= value <= domain.values[1]


def contents(folder: Path) -> dict[Path, bytes | None]:
    """The bytes of all files below a folder, and None for its folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


class Remote(Storage):
    """A local folder without its path, as an object store: only the methods of Storage reach the files."""

    def __init__(self, uri: str | Path) -> None:
        super().__init__(uri)
        self.local = None

    def __truediv__(self, name: str) -> Storage:
        return Remote(f"{self.uri}/{name}")
