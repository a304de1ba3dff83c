"""constraints.txt pins the tested version of everything that an installation brings."""

from __future__ import annotations

import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="the constraints are for Python 3.11")
ROOT = Path(__file__).parents[1]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = {canonicalize_name(line.split("==")[0]): line.split("==")[-1] for line in LINES[1:]}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirements() -> list[Requirement]:
    """What a cluster's machine installs: dependencies, build tools, and the extras: `cloud` for a head on AWS."""
    lines = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    extras = PROJECT["project"]["optional-dependencies"]
    return [Requirement(line) for line in lines + [x for name in extras if name != "dev" for x in extras[name]]]


def test_every_line_pins_one_version_of_one_package() -> None:
    """No ranges, URLs, local versions or duplicates; the first line is the command that makes the file."""
    assert LINES[0].startswith("# uv pip freeze")
    assert [line for line in LINES[1:] if not re.fullmatch(r"[A-Za-z0-9._-]+==\d[A-Za-z0-9.]*", line)] == []
    assert len(PINS) == len(LINES) - 1
    assert "dogvae" not in PINS


def test_everything_that_is_installed_is_pinned_within_its_bounds() -> None:
    """Dependencies of dependencies are followed as far as the pinned versions are installed here."""
    assert len(requirements()) > 15
    waiting, seen = [(r, "") for r in requirements()], set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        assert name in PINS, name
        assert Version(PINS[name]) in requirement.specifier, requirement
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen and distribution(name).version == PINS[name]:
                seen.add((name, wanted))
                waiting += [(Requirement(line), wanted) for line in distribution(name).requires or []]
