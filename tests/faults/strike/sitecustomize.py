"""With this folder on PYTHONPATH, a training worker raises MemoryError when the file $STRIKE appears."""

import ctypes
import os
import sys
import threading
import time


def _watch(file: str) -> None:
    while True:
        time.sleep(0.1)
        for ident, frame in list(sys._current_frames().items()):
            while frame and not frame.f_code.co_filename.endswith("training/loop.py"):
                frame = frame.f_back
            if frame and os.path.exists(file):
                try:
                    os.unlink(file)  # so that only one worker raises it
                except FileNotFoundError:
                    break
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(MemoryError))


if "STRIKE" in os.environ:
    threading.Thread(target=_watch, args=(os.environ["STRIKE"],), daemon=True).start()
