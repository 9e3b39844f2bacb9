"""The field's mistakes as tests: fdiv must pass them all, and thin adapters run them on other systems."""
