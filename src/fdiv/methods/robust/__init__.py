"""Plans that hold up under other dynamics than those of the data."""
