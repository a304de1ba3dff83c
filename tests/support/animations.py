"""The frames of animation files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def frames_of(path: Path | str) -> tuple[np.ndarray, float]:
    """All frames (n, h, w, 3) of a .gif, .webp or .mp4 file, and the seconds that each frame is shown."""
    if Path(path).suffix.lower() == ".mp4":
        import av

        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(stream)]
            assert stream.average_rate
            return np.stack(frames), float(1 / stream.average_rate)
    with Image.open(path) as image:
        frames, durations = [], set()
        for i in range(image.n_frames):
            image.seek(i)
            image.load()
            frames.append(np.asarray(image.convert("RGB")))
            durations.add(image.info.get("duration"))
        assert image.info.get("loop") == 0  # for ever
        assert len(durations) == 1
        return np.stack(frames), durations.pop() / 1000
