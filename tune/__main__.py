"""`python -m tune`: the commands search, report and dashboard. `dogvae search` is `python -m tune search`."""

import sys

from dogvae.commands.flags import run
from dogvae.commands.search import main

if __name__ == "__main__":
    sys.exit(run(main))
