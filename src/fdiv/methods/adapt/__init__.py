"""Adapting a trained network to data without labels."""
