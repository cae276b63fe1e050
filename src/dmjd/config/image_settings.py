"""Checks of the settings of images that depend on each other. Imports no torch."""

from typing import Any

from dmjd.config.checks import check_rising


def check_image_settings(config: Any) -> None:
    """Check settings of images that depend on each other: channels, value range and area of crops.

    Raises:
        ValueError: naming the setting.
    """
    for name in ("mean", "std"):
        values = getattr(config, name)
        if values is not None and len(values) != config.in_chans:
            raise ValueError(f"{name} has {len(values)} values for {config.in_chans} channels (--in-chans)")
    if config.value_range is not None:
        check_rising("value_range", config.value_range)
    check_rising("crop_scale", config.crop_scale, may_be_equal=config.crop_scale[1] > 0)
    if (config.mean is None) != (config.std is None):
        raise ValueError("give both mean and std, or neither")
