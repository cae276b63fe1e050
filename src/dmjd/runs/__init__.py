"""Run folders: checkpoints, the driver of a training, and building the parts of a run from its configuration."""
