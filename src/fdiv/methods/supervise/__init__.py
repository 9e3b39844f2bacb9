"""Learning from labels under other losses than cross-entropy."""
