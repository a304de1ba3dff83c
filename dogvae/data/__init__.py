"""From photos to batches of images: `prepare` writes a dataset, `Dataset` opens it, `Batches` reads it."""
