"""Layers and functions on tokens that know no encoder and no method."""
