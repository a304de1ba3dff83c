"""The commands: `dogvae COMMAND` is in COMMAND.py, or else in cli.py and play.py."""
