"""Distilling a teacher into a student."""
