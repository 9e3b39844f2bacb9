"""Samplers of paths."""
