"""Images in: sources and the pipeline from them to batches."""

# Advice for messages about labels that are missing.
WITHOUT_LABELS = (
    "do without labels (training: --config.data.labels=False --config.model.num_classes=0; preparing: no --labels)"
)
