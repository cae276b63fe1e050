"""From a file to a tensor: decoding, channel policy, resampling, preprocessing."""
