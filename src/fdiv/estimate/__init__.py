"""From evidence to a number a row: one file a kind of evidence."""
