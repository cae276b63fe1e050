"""The training loop and what it needs of a machine; it knows no method."""
