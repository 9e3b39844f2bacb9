"""Matching a target distribution that can be scored but not sampled."""
