"""From videos to packed batches."""
