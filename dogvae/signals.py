"""SIGINT and SIGTERM: a command ends with one line and the exit status 128 + n, whatever it is doing.

`run` is the first call of every command, before anything slow is imported. The first signal raises KeyboardInterrupt,
so that what is unfinished is deleted. During an import it waits for the import's end: torch's C++ calls Python while it
is imported, and aborts if that raises. A second signal ends the process at once. `stop_signals` replaces this where a
command first saves its work.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
CLEANUP_S = 10  # how long a command may take to end after the first signal
AGAIN_S = 0.01  # until a KeyboardInterrupt that was lost, or has to wait, is raised again

_first = 0  # the signal that ends this command
_is_over = False  # the command has returned, and Python is shutting down
_status = 1  # the exit status; 1 for an error that nobody caught
_raise_again = False  # the last KeyboardInterrupt was lost, or had to wait


def run(main: Callable[[], int]) -> int:
    """The exit status of a command, whose function `main` imports what it needs."""
    global _is_over, _status
    atexit.register(_leave)  # registered first, called last
    # Ray's own handler prints a C++ stack and aborts. Ray reads this variable when it is imported.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    for signum in (*WORDS, signal.SIGALRM):
        signal.signal(signum, _interrupt)
    sys.unraisablehook, sys.excepthook = _lost_in_callback, _lost_in_extension
    try:
        _status = main()
        if _raise_again:
            raise KeyboardInterrupt
    except BaseException as error:  # also an error that follows from the interruption
        if _first:
            _status = end()
        elif isinstance(error, SystemExit) and not error.code:  # --help
            _status = 0
        else:
            raise
    finally:
        _is_over = True
    if _first:
        _leave()  # without `ray.shutdown`: threads of the command that still use Ray would crash, or start it again
    return _status


def _leave() -> None:
    """Exit. Python would next delete all modules, which takes time, and no longer handles signals meanwhile."""
    if _first:
        _kill_children()
    for stream in (sys.stdout, sys.stderr):
        if stream:  # None after a broken pipe
            stream.flush()
    os._exit(_status)


def _kill_children() -> None:
    """Kill the processes of a Ray that started here: some would notice only after a minute that Ray has ended."""
    if "ray" in sys.modules:
        with suppress(Exception):  # psutil may be half imported: then they have the minute
            import psutil

            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()


def end() -> int:
    """Print one line about the signal that ends the command, by default SIGINT; returns the exit status."""
    signum = _first or signal.SIGINT
    print(WORDS[signum], file=sys.stderr, flush=True)
    return 128 + signum


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _first, _raise_again
    is_again = _raise_again and signum == signal.SIGALRM
    if (_first and not is_again) or _is_over:
        if not (_first and _is_over):  # else the line is printed already
            _first = _first or signum
            os.write(2, f"{WORDS[_first]}\n".encode())  # not `print`, in which the signal may have come
        _kill_children()
        os._exit(128 + _first)
    _first, _raise_again = _first or signum, False
    if _is_importing(frame):
        _interrupt_soon()
        return
    signal.alarm(CLEANUP_S)
    raise KeyboardInterrupt


def _interrupt_soon() -> None:
    global _raise_again
    _raise_again = True
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether `frame` belongs to a module that is being imported, or was called from one."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _was_lost(kind: type[BaseException]) -> bool:
    """Whether Python was about to print the end of the command and go on. Then it is raised once more, soon."""
    global _first
    if issubclass(kind, SystemExit):  # by the handler that `ray.init` installs
        _first = _first or signal.SIGTERM
    if not (_first and issubclass(kind, (KeyboardInterrupt, SystemExit))):
        return False
    _interrupt_soon()
    return True


def _lost_in_callback(unraisable: Any) -> None:
    if not _was_lost(unraisable.exc_type):
        sys.__unraisablehook__(unraisable)


def _lost_in_extension(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if not _was_lost(kind):
        sys.__excepthook__(kind, error, trace)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that collects SIGINT and SIGTERM. The first is only noted, the second has its usual effect.

    Only the main thread of a program can receive signals: in another one, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        if len(received) > 1:
            usual = before[signum]
            if not callable(usual):
                raise SystemExit(128 + signum)
            usual(signum, frame)

    before = {s: signal.signal(s, note) for s in WORDS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
