"""The shortcuts of a start: which names they need, and a run on a Ray that lacks them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import pytest

from dogvae.compat import release
from dogvae.training import fast_start
from tests.support.command import ROOT

TINY = "--data drawn:40 --image-size 32 --width 4 --latent-dim 4 --batch-size 16 --epochs 1 --cpus 1"


def test_no_private_name_is_missing() -> None:
    """Fails on a release of Ray that lacks a name, and says which: then it must not be in `TESTED`."""
    missing = []
    for name in fast_start.PRIVATE:
        module, _, path = name.partition(":")
        try:
            reduce(getattr, path.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


def test_early_worker_has_every_method_of_ray_trains() -> None:
    from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker

    theirs = {name for name in vars(RayTrainWorker) if not name.startswith("_")}
    assert theirs == set(fast_start.EarlyRayTrainWorker.METHODS)


@pytest.mark.parametrize(
    ("switch", "used"),
    [("1", ["node", "controller", "workers"]), ("0", []), ("node,workers", ["node", "workers"]), ("", [])],
)
def test_switch_decides_which_shortcuts_are_used(switch: str, used: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOGVAE_FAST_START", switch)
    assert [name for name in ("node", "controller", "workers") if fast_start.uses(name)] == used


def test_untested_release_of_ray_takes_the_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOGVAE_FAST_START", raising=False)
    assert fast_start.uses("node")
    monkeypatch.setattr(fast_start, "release", lambda package: "2.61")
    assert not any(fast_start.uses(name) for name in ("node", "controller", "workers"))


def test_tested_releases_include_the_installed_one() -> None:
    assert release("ray") in fast_start.TESTED


# What a process does first, so that Ray is as a later release may be: it works, but not for us.
LATER = {
    "node": """
import ray._private.node as module
def refuse(cls): raise TypeError("Node is final")
module.Node.__init_subclass__ = classmethod(refuse)
""",
    "controller": """
import ray.train.torch
import ray.train.v2._internal.execution.controller as module
del module.TrainController
""",
    "constructor": """
import ray.train.v2._internal.execution.controller as module
init = module.TrainController.__init__
def refuse(self, **given):
    if type(self).__name__ == "Controller":
        raise TypeError("missing a required argument: 'reservations'")
    init(self, **given)
module.TrainController.__init__ = refuse
""",
}


@pytest.mark.slow
@pytest.mark.parametrize("later", LATER)
def test_run_on_a_ray_that_has_other_private_names_works_and_says_so(later: str, tmp_path: Path) -> None:
    code = f"{LATER[later]}\nimport sys\nfrom dogvae.commands.cli import main\nsys.argv[0] = 'dogvae'\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *TINY.split(), "--name", "one"],
        cwd=tmp_path, env={**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (note,) = [line for line in done.stderr.splitlines() if line.startswith("warning:")]
    shortcut = "node" if later == "node" else "controller"
    assert note.startswith(f"warning: starting without the shortcut {shortcut!r} (")
    assert (tmp_path / "runs/one/export/model.safetensors").exists()
