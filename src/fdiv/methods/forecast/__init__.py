"""Forecasts that are distributions."""
