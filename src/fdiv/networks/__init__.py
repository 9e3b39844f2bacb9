"""Small networks for inputs with labels: one file an architecture, `all.py` for recipes."""
