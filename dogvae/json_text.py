"""JSON of files that anybody may have edited."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 32  # levels; the files of this project have 6


def parse(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError for any text that is not JSON or is nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        level: list[Any] = [None]
    else:
        level = [value]
        for _ in range(DEEPEST):
            parents = [v for v in level if isinstance(v, (dict, list))]
            level = [child for v in parents for child in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    return value
