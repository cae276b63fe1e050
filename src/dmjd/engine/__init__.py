"""The training loop, optimizers, devices and loggers. Knows nothing of the pre-training method."""
