"""Who writes the text that a model is distilled on."""
