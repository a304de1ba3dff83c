"""The errors that end a command with a message of one line."""

from __future__ import annotations


class UsageError(ValueError):
    """A mistake of the user. The message names the flag or file and the remedy. Exit status 2."""


class RunFailed(RuntimeError):
    """A run cannot continue, and the user made no mistake. The message says why and what to do. Exit status 1."""


class OutOfMemory(RunFailed):
    """A step does not fit into the memory of a device, so a restart would fail in the same way."""
