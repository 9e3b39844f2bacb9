"""Writing text with a model, or with a quick one that a good one corrects."""
