"""Diffusion models as denoisers: levels of noise, samplers, paths, probes, and laws known in closed form."""
