"""Train a VAE on dog photos: `python train_distributed.py` is `dogvae train`."""

import sys

from dogvae import signals


def _main() -> int:
    from dogvae.commands import entry, train

    return entry.run(train.main)


if __name__ == "__main__":
    sys.exit(signals.run(_main))
