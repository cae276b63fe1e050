"""Evaluations that train the whole encoder."""
