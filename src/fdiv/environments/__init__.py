"""Worlds of states and actions, and small training loops on them, for the papers that need them."""
