"""The errors that end a command with a message of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A mistake of the user. The message names the flag or file and the remedy. Exit status 2."""


class RunFailed(RuntimeError):
    """A run cannot continue, and the user made no mistake. The message says why and what to do. Exit status 1."""


class OutOfMemory(RunFailed):
    """A step does not fit into the memory of a device, so a restart would fail in the same way."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean NAME?` for the known name that is closest to `word`, or an empty string if none is close."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]}?" if close else ""
