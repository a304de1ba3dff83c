"""`python -m tune`: the commands search, report and dashboard. `dogvae search` is `python -m tune search`."""

import sys

from dogvae import signals


def _main() -> int:
    from dogvae.commands import entry, search

    return entry.run(search.main)


if __name__ == "__main__":
    sys.exit(signals.run(_main))
