"""Objectives on what a network reads off its inputs, and how."""
