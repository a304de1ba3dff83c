"""From photos to batches."""
