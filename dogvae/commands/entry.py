"""What every command line begins and ends with: parsing, errors of one line, exit codes."""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from dogvae import signals
from dogvae.cluster import connect
from dogvae.errors import RunFailed, UsageError, did_you_mean


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError with one line, instead of printing the usage and exiting."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        wrong, _, known = message.partition("invalid choice: ")[2].partition(" (choose from ")
        hint = did_you_mean(wrong.strip("'"), re.findall(r"[\w-]+", known))
        raise UsageError(f"{message}{hint} (see {self.prog} --help)")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of the base class; for an unknown flag, the closest one of the command is named."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parser: argparse.ArgumentParser = self
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parser = action.choices.get(getattr(parsed, action.dest), self)
            flag = unknown[0].partition("=")[0]
            known = parser._option_string_actions if flag.startswith("--") else []
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(flag, known)}")
        return parsed


def use_fast_start() -> None:
    """Have `connect` start Ray with the shortcuts of `fast_start`, which is imported only then."""

    def start_ray(verbose: bool, **options: Any) -> None:
        from dogvae.training import fast_start

        fast_start.start_ray(verbose, **options)

    connect.start_ray = start_ray


def _check_not_empty(argv: Sequence[str]) -> None:
    """Raise UsageError for an empty argument: as a path it would mean another folder than the user's."""
    for before, argument in pairwise(["the command", *argv]):
        flag, equals, value = argument.partition("=")
        if not argument or (flag.startswith("--") and equals and not value):
            name = flag or (before if before.startswith("-") else f"the argument after {before}")
            raise UsageError(f"{name}: the text is empty, as that of a shell variable that is not set")


def _print_error(error: BaseException) -> None:
    """Print an error as one line, also if it quotes a file that holds several."""
    line = " ".join(filter(None, str(error).splitlines()))
    print(f"error: {line.encode(errors='backslashreplace').decode()}", file=sys.stderr)


def run(main: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status: 2 for a mistake of the user, 1 for a failed run, 130 after Ctrl-C.

    An error is printed to stderr as one line; with --verbose, mistakes raise UsageError instead.
    """
    argv = sys.argv[1:] if argv is None else argv
    use_fast_start()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are not UTF-8 come out as they are
    try:
        _check_not_empty(argv)
        return main(argv) or 0
    except UsageError as error:
        if "--verbose" in argv:
            raise
        _print_error(error)
        return 2
    except RunFailed as error:
        _print_error(error)
        return 1
    except KeyboardInterrupt:
        return signals.end()
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        if "--verbose" in argv:
            raise
        print(f"error: {error.filename or ''}: {error.strerror or error}; choose another folder", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output has ended (`| head`). Without stdout, Python does not complain at exit either.
        sys.stdout = None
        return 141
