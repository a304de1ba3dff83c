"""The Ray cluster: connecting to it, its nodes and network, and sending commands to it."""
