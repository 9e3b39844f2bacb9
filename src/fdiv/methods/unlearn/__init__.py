"""Taking what a model has learnt away from it."""
