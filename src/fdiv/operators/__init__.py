"""What a divergence induces: the maps from scores to distributions."""
