"""Run folders: checkpoints, and from a configuration to the parts of a run and back."""
