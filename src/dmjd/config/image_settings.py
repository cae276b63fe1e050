"""Checks of the settings of images that depend on each other. Imports no torch."""

from typing import Any

from dmjd.config.checks import not_rising


def check_image_settings(config: Any) -> None:
    """Check settings of images that depend on each other: channels, value range and area of crops.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) != config.in_chans:
            raise ValueError(f"{name} has {len(values)} values for {config.in_chans} channels (--in-chans)")
    if config.value_range is not None and config.value_range[0] >= config.value_range[1]:
        raise ValueError(not_rising("value_range", config.value_range))
    if config.crop_scale[0] > config.crop_scale[1] or config.crop_scale[1] == 0:
        raise ValueError(not_rising("crop_scale", config.crop_scale))
    if (config.mean is None) != (config.std is None):
        raise ValueError("give both mean and std, or neither")
