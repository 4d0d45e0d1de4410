"""Train a policy: the loop, averaging, checkpoints, validation and metrics. Knows no config."""
