"""How long a search leaves a slot idle: from the end of a trial to the first step of the next one.

    python -m tune search --data dataset --name s
    python benchmarks/trial_gaps.py runs/s

Reads it from the curves: an epoch is written when it has ended, and says how long training has lasted until then. Only
sensible for a search that was not interrupted.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def span(folder: Path) -> tuple[float, float]:
    """Wall times of a trial's first step and of its last epoch's end."""
    events = EventAccumulator(str(folder)).Reload()
    ends, seconds = events.Scalars("val/loss"), events.Scalars("run/seconds")
    return ends[0].wall_time - seconds[0].value, ends[-1].wall_time


def main(search: Path) -> None:
    spans = sorted(span(file.parent) for file in (search / "trials").glob("*/metrics.jsonl"))
    ends = sorted(end for _, end in spans)
    gaps = []
    for start, _ in spans:
        before = [end for end in ends if end <= start]
        if before:
            gaps.append(start - before[-1])
            ends.remove(before[-1])  # its slot is taken
    print(f"{len(spans)} trials, {len(gaps)} of them after another in the same slot")
    if gaps:
        middle, most = statistics.median(gaps), max(gaps)
        print(f"from a trial's end to the next one's first step: median {middle:.2f} s, at most {most:.2f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
