"""From image files to tensors: decoding, channels and value range, resampling, preprocessing."""
