"""The forward pass of training: packed rows, attention over them, and the log-probabilities of their targets."""
