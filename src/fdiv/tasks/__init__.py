"""What is learned: a source of data, a judge of answers, and an honest measurement of a model."""
