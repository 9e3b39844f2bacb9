"""Entropic optimal transport: solvers, their derivatives, and the closed forms that they are held to."""
