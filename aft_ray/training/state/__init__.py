"""The training state of a worker: saved for a restart, and moved out of GPU memory for colocated samplers."""
