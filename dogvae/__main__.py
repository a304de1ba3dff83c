"""The command `dogvae`, which is also `python -m dogvae`."""

import sys

from dogvae import signals


def _main() -> int:
    from dogvae.commands.cli import main

    return main()


def main() -> None:
    """Entry point of the console script."""
    sys.exit(signals.run(_main))


if __name__ == "__main__":
    main()
