"""Reinforcement learning with a divergence to a reference policy."""
