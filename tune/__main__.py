"""The search's commands: `python -m tune search` is `dogvae search`."""

import sys

from dogvae.commands.flags import run
from dogvae.commands.search import main

if __name__ == "__main__":
    sys.exit(run(main))
