"""Models whose density is known up to its normaliser: p(x) is proportional to e^(-E(x))."""
