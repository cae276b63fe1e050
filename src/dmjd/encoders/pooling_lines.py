"""Invalid pixels in models of other libraries, which pool all tokens: code that leaves invalid ones out."""

from dmjd.config.invalid import BLENDED
from dmjd.encoders.stored import Stored
from dmjd.images.invalid import LEAST_VALID
from dmjd.images.preprocess import Preprocess
from dmjd.nn.layers import TRANSFORMER_NORM_EPS


def knows_invalid(encoder: Stored) -> bool:
    """Whether the preprocessing of an encoder knows invalid pixels."""
    return encoder.preprocess is not None and encoder.preprocess.invalid is not None


def invalid_settings(preprocess: Preprocess) -> str:
    """The settings that make pixels invalid, e.g. "nodata auto, alpha invalid"."""
    settings = [] if preprocess.nodata is None else [f"nodata {preprocess.nodata}"]
    return ", ".join(settings + ([] if preprocess.alpha == BLENDED else [f"alpha {preprocess.alpha}"]))


def timm_pooling(encoder: Stored) -> list[str]:
    """Lines after those that load a ``model`` of timm: its features are those of :meth:`Encoder.encode`. None without
    invalid pixels.
    """
    if not knows_invalid(encoder):
        return []
    return [
        *_valid_lines(encoder),
        'options = {"output_fmt": "NLC", "intermediates_only": True}',
        "tokens = model.eval().forward_intermediates(pixels.nan_to_num(0.0), 1, **options)[0]",
        "features = (tokens * valid).sum(1) / valid.sum(1)",
        f"features = F.layer_norm(features, [{encoder.embed_dim}], eps={TRANSFORMER_NORM_EPS})  # encoder.encode",
    ]


def transformers_pooling(encoder: Stored) -> list[str]:
    """Lines after those that load a ``model`` of transformers: the mean valid token. None without invalid pixels."""
    if not knows_invalid(encoder):
        return []
    return [
        *_valid_lines(encoder),
        f"tokens = model(pixels.nan_to_num(0.0)).last_hidden_state[:, {encoder.num_prefix_tokens}:]",
        "features = (tokens * valid).sum(1) / valid.sum(1)",
    ]


def _valid_lines(encoder: Stored) -> list[str]:
    """Code for the tokens that count: ``valid`` [B, N, 1] bool of ``pixels``."""
    preprocess, P = encoder.preprocess, encoder.patch_size
    assert preprocess is not None
    height, width = encoder.img_size
    return [
        "",
        f"# It was trained with invalid pixels ({invalid_settings(preprocess)}), which this model does not know:",
        "# give it the mean, 0, in their place, and pool only the tokens of which at least half is valid.",
        f"# pixels: float32 [B, {encoder.in_chans}, {height}, {width}], normalized, NaN where invalid",
        "import torch.nn.functional as F",
        "",
        f"valid = F.unfold((~pixels.isnan()).float(), {P}, stride={P}).mean(1).unsqueeze(2) >= {LEAST_VALID}",
        "valid |= ~valid.any(1, keepdim=True)  # all tokens of an image that has no valid one",
    ]
