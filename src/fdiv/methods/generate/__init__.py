"""Generators: denoisers, and samplers of one step that are distilled from them."""
