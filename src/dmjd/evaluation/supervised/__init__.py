"""Evaluations that train the encoder with labels: fine-tuning, segmentation, detection."""
