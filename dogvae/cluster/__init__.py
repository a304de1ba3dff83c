"""Ray: connecting to it, its nodes, sending a command to it."""
