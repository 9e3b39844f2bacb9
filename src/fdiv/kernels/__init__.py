"""What runs a divergence on every logit of a row: its cell as a graph, and the kernels made from it."""
