"""constraints.txt: whoever installs with it gets the versions that were tested, of everything that is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib", reason="the constraints are for Python 3.11")
ROOT = Path(__file__).parents[2]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    """Versions by normalised name."""
    found = {}
    for line in LINES[1:]:
        name, _, version = line.partition("==")
        found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def requirements() -> list[Requirement]:
    """What training on a cluster installs: the dependencies, what builds, and the extras that are no tools of ours."""
    project = PROJECT["project"]
    extras = [line for name in ("onnx", "optuna", "serve", "video") for line in project["optional-dependencies"][name]]
    return [Requirement(line) for line in project["dependencies"] + extras + PROJECT["build-system"]["requires"]]


def test_every_line_is_one_version_of_one_package() -> None:
    """No ranges, places or local versions, none twice; the first line says how the file is made."""
    assert LINES[0].startswith("# uv pip freeze")
    assert [line for line in LINES[1:] if not re.fullmatch(r"[A-Za-z0-9._-]+==\d[A-Za-z0-9.]*", line)] == []
    assert len(pins()) == len(LINES) - 1


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    """Also boto3, with which a head on AWS asks for workers; and not the project itself."""
    versions = pins()
    wanted = [*requirements(), Requirement("boto3")]
    assert len(wanted) > 15
    for requirement in wanted:
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in versions, name
        assert Version(versions[name]) in requirement.specifier, name
    assert "dogvae" not in versions
