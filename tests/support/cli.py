"""`dogvae ...` in the test's own process."""

from __future__ import annotations

import pytest

from dogvae.commands import cli, entry


def dogvae(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `dogvae ARGV`."""
    code = entry.run(cli._main, [*map(str, argv)])
    return code, *capsys.readouterr()


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The error of `dogvae ARGV`, which must exit with 2 and print that one line and nothing else."""
    code, out, err = dogvae(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err
