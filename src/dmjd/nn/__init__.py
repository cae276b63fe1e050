"""Layers, and functions on tokens."""
