"""The errors that end a command with one line."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake of the user's: the message names the flag or file and the remedy. Shown as one line, exit 2."""


class RunFailed(RuntimeError):
    """A run that cannot go on, through no mistake of the user's: one line that says why and what to do. Exit 1."""


class OutOfMemory(RunFailed):
    """A step does not fit into the memory of a device: it would not the next time either."""
