"""The paper GPU of these tests: built once by gcc, and given to a process of its own for each test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.command import ROOT

REQUIRED = "DOGVAE_PAPER_GPU"  # the gate sets it: then a missing compiler or CUDA build of torch is a failure
# torch imports the module in every process, also in Ray's workers.
ENTRY_POINT = "[torch.backends]\npapergpu = tests.paper.device:install\n"


@pytest.fixture(scope="session")
def paper_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has a paper GPU."""
    packages = Path(torch.__file__).parents[1]
    headers = [f"-I{path.parent}" for path in sorted(packages.glob("nvidia/*/include/cuda_runtime_api.h"))]
    headers += [f"-I{packages}/triton/backends/nvidia/include"]  # has the headers that pip's CUDA runtime lacks
    lacking = ["gcc"] * (not shutil.which("gcc")) + ["a CUDA build of torch"] * (torch.version.cuda is None)
    if lacking:
        reason = f"the paper GPU needs {' and '.join(lacking)}"
        (pytest.fail if REQUIRED in os.environ else pytest.skip)(reason)
    folder = tmp_path_factory.mktemp("papergpu")
    library, source = folder / "libpapergpu.so", Path(__file__).with_name("papergpu.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-w", *headers, source, "-o", library, "-lpthread"], check=True)
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / name).symlink_to(library)
    about = folder / "papergpu-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: papergpu\nVersion: 0\n")
    (about / "entry_points.txt").write_text(ENTRY_POINT)
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{folder}",
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
        # Memory that a kernel would have written is zero then. Otherwise it holds what was there before.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }


@pytest.fixture
def on_paper_gpu(paper_environment: dict[str, str]) -> Callable[..., Any]:
    """Runs a function `MODULE:NAME` of tests.paper with keyword arguments in a process that has a paper GPU.

    Returns what the function returns. `env` changes the environment; None takes a variable away.
    """

    def run(function: str, env: dict[str, str | None] | None = None, **arguments: Any) -> Any:
        module, name = function.split(":")
        code = (
            f"import json, sys; from tests.paper.{module} import {name}; "
            f"print(json.dumps({name}(**json.loads(sys.argv[1]))))"
        )
        environment = {name: value for name, value in {**paper_environment, **(env or {})}.items() if value is not None}
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(arguments)],
            env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run
