"""Output of a Jupyter notebook that updates itself, where a terminal would have a live line."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from typing import Any

INTERVAL_S = 0.2  # between two updates; what comes in between is skipped


def silence_widgets() -> None:
    """Silence Ray and tqdm, which complain when a notebook without ipywidgets imports them. Nothing here uses those."""
    warnings.filterwarnings("ignore", "IProgress not found")
    logging.getLogger("ray.widgets.util").setLevel(logging.WARNING)


def cell_output() -> CellOutput | None:
    """A new output of the cell that runs; None outside of a notebook."""
    ipython = sys.modules.get("IPython")  # a notebook has imported it
    shell = ipython.get_ipython() if ipython else None
    return CellOutput() if hasattr(shell, "kernel") else None


class CellOutput:
    """Text below a cell: each `show` replaces what was there."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0
        self._skipped = ""

    def show(self, text: str) -> None:
        """Show one or more lines of text."""
        self._skipped = text
        if time.monotonic() - self._shown >= INTERVAL_S:
            self.flush()

    def flush(self) -> None:
        """Show what was skipped since the last update."""
        from IPython.display import display

        if not self._skipped:
            return
        data, self._shown, self._skipped = {"text/plain": self._skipped}, time.monotonic(), ""
        if self._handle:
            self._handle.update(data, raw=True)
        else:
            self._handle = display(data, raw=True, display_id=True)
