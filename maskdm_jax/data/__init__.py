"""Images in: sources and the pipeline from them to batches."""


class DataError(ValueError):
    """Data that cannot be used; the message names the path and says what would work."""
