"""Images in: sources and the pipeline from them to batches."""

# What to do about labels that cannot be had, for messages.
WITHOUT_LABELS = (
    "do without labels (training: --config.data.labels=False --config.model.num_classes=0; preparing: no --labels)"
)


class DataError(ValueError):
    """Data that cannot be used; the message names the path and says what would work."""
