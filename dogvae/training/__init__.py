"""Training: the loop over epochs and steps on every rank, and how Ray Train runs it."""
