"""`python -m dogvae` is the command `dogvae`."""

from dogvae.commands.cli import main

if __name__ == "__main__":
    main()
