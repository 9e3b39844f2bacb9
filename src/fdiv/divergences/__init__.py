"""The catalogue: one file a divergence, or a tight pair."""
