"""Training and searching in a Jupyter notebook: its progress, its stop button, and docs/quickstart.ipynb."""

from __future__ import annotations

import io
import os
import re
import time
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient
from PIL import Image

from tests.support.command import ROOT

QUICKSTART = ROOT / "docs/quickstart.ipynb"
SECONDS = 360  # of the quickstart: twice what it takes at most on two cores that nothing else uses
SMALL = 'preset="small", width=4, batch_size=16, cpus=1'


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels import this checkout, and start a new Ray."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("RAY_ADDRESS", "local")


def execute(notebook: Any, folder: Path) -> Any:
    """Run all cells in a fresh kernel, in `folder`. An error in a cell is raised."""
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


def pictures(notebook: Any) -> list[np.ndarray]:
    """The pictures (h, w, 3) that the cells of a notebook show, in order."""
    data = [o["data"] for c in notebook.cells for o in c.get("outputs", []) if "data" in o]
    coded = [d.get("image/jpeg") or d.get("image/png") for d in data]  # Pillow's pictures have both
    return [np.asarray(Image.open(io.BytesIO(b64decode(code))).convert("RGB")) for code in coded if code]


def test_progress_is_one_output_that_updates_itself(tmp_path: Path, fresh: None) -> None:
    code = """
from dogvae.console import Progress

with Progress("counting") as line:
    for i in range(1, 101):
        line.update(i, 100, f"dog {i}", milestone=True)
        if i == 50:
            line.note("half of them")
"""
    notebook = execute(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path)
    kinds = {output["output_type"]: output for output in notebook.cells[0].outputs}
    assert len(notebook.cells[0].outputs) == len(kinds) == 2
    assert kinds["stream"]["text"] == "half of them\n"
    assert re.fullmatch(
        r"counting: 0:00 left, dog 100|counting: dog 100.*", kinds["display_data"]["data"]["text/plain"]
    )


# --- the stop button


@pytest.fixture
def kernel(tmp_path: Path, fresh: None) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel()


def run_cell(client: BlockingKernelClient, code: str) -> str:
    """Run a cell, which must succeed; what it printed."""
    printed = []

    def keep(message: dict[str, Any]) -> None:
        printed.append(message["content"].get("text", ""))

    reply = client.execute_interactive(code, output_hook=keep, timeout=300)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(printed)


@pytest.mark.alone
@pytest.mark.slow
def test_stop_button_saves_a_checkpoint_and_resume_goes_on(
    kernel: tuple[KernelManager, BlockingKernelClient], tmp_path: Path
) -> None:
    """Then a search with its best run, in the same kernel."""
    manager, client = kernel
    client.execute(f'import dogvae; run = dogvae.train("drawn:200", name="dogs", epochs=300, {SMALL}, image_size=32)')
    began = time.monotonic()
    while not re.search(r"epoch \d+/300 loss", str(client.get_iopub_msg(timeout=240)["content"])):  # one is done
        assert time.monotonic() - began < 240
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=120)
    assert reply["content"]["status"] == "ok", reply["content"]
    done = int(run_cell(client, "print(len(run.metrics))"))
    assert 1 <= done < 300
    assert f"{done} of 300; run.resume() goes on" in run_cell(client, "print(run)")
    told = run_cell(client, f"run = run.resume(epochs={done + 2}); print(len(run.metrics), run.model.sample(2).shape)")
    assert told.endswith(f"{done + 2} (2, 32, 32, 3)\n")
    told = run_cell(
        client,
        'found = dogvae.search("drawn:200", name="best", trials=3, epochs=2, search={"lr": "loguniform(1e-3,1e-2)",'
        ' "latent_dim": [2, 4]}, set={"preset": "small", "width": 4, "samples": 1, "latent_size": 4})\n'
        'print([t["state"] in ("done", "stopped") for t in found.trials], found.best.best["val_loss"] == '
        'min(t["loss"] for t in found.trials), found.model.sample(2).shape)',
    )
    assert told.endswith("[True, True, True] True (2, 64, 64, 3)\n")
    assert (tmp_path / "runs/best/export/config.json").exists()


# --- the quickstart


def test_quickstart_is_small_and_has_run_from_top_to_bottom() -> None:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o["output_type"] == "error"]
    text = QUICKSTART.read_text()
    assert len(text) < 400_000
    assert not re.search(r"/tmp/|/root/|\.venv/", text)  # of the machine it ran on
    assert len(pictures(notebook)) == 8


@pytest.mark.alone
@pytest.mark.slow
def test_quickstart_runs_in_a_fresh_kernel_within_minutes(tmp_path: Path, fresh: None) -> None:
    notebook = nbformat.read(QUICKSTART, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    began = time.monotonic()
    execute(notebook, tmp_path)
    assert time.monotonic() - began < SECONDS
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert any("6 of 6 trials ended" in output["data"].get("text/plain", "") for output in outputs if "data" in output)
    shown = pictures(notebook)
    assert len(shown) == 8
    sheet = shown[2].astype(float)  # photos above their reconstructions, 64 pixels each, 2 pixels apart
    assert 1 < np.abs(sheet[2:66] - sheet[68:132]).mean() < 30  # grey levels
