"""Train a VAE on dog photos: `python train_distributed.py` is `dogvae train`."""

import sys

from dogvae.commands.flags import run
from dogvae.commands.train import main

if __name__ == "__main__":
    sys.exit(run(main))
