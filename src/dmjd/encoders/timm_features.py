"""timm's feature backbones. The only file that imports from ``timm.models._features``, which is not public API.

``tests/encoders/test_timm_features.py`` lists the versions of timm that were tested.
"""

from collections.abc import Sequence

from timm.models._features import FeatureGetterNet, feature_take_indices
from torch import nn

__all__ = ["FeatureGetterNet", "feature_backbone", "take_indices"]


def take_indices(num_maps: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Resolve the ``indices`` argument of ``forward_intermediates``.

    Args:
        num_maps: number of maps.
        indices: map indices (negative from the end), a number of last maps, or None for all.

    Returns:
        The absolute indices, and the largest of them.
    """
    return feature_take_indices(num_maps, indices if indices is None or isinstance(indices, int) else list(indices))


def feature_backbone(encoder: nn.Module, out_indices: int | Sequence[int] | None = None) -> FeatureGetterNet:
    """Wrap an encoder as timm does for ``features_only=True``: images -> list of maps, with ``feature_info``.

    Args:
        encoder: has ``feature_info``, ``forward_intermediates`` and ``prune_intermediate_layers``; it is pruned.
        out_indices: which maps; None = the last four, or all if there are fewer.
    """
    if out_indices is None:
        out_indices = min(4, len(encoder.feature_info))  # type: ignore[arg-type]
    return FeatureGetterNet(encoder, out_indices=out_indices if isinstance(out_indices, int) else tuple(out_indices))
