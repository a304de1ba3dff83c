"""Training: the loop over steps and epochs, on every rank, and Ray Train around it."""
