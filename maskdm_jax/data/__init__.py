"""Images in: sources and the pipeline from them to batches."""
