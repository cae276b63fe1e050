"""The cases of the speed part, in the order of importance, and how each is compiled."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

EAGER, COMPILED, GRAPHS = "eager", "compiled", "graphs"


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        comparison: key of ``COMPARISONS``, or the recipe of a small model.
        kind: "dmjd", "dense reference", "transformers", "small" or "profile".
        layers: "recompute", or which plain layers take the place of ours.
        mode: "eager", "compiled", or "graphs": compiled, and replayed as CUDA graphs.
        batch: images per step; None: the largest that fits, found by doubling.
    """

    comparison: str
    kind: str
    layers: str
    mode: str
    batch: int | None

    @property
    def name(self) -> str:
        """Name of the entry."""
        return f"{self.comparison} | {self.kind} | {self.layers} | {self.mode} | {self.batch or 'largest'}"

    @property
    def is_small(self) -> bool:
        """Whether it trains on 32-pixel images in memory."""
        return self.kind in ("small", "profile")


def cases(toy: bool) -> list[Case]:
    """All cases in the order of importance."""
    vit, conv, small, both = "ViT-B, MAE", "ConvViT-B, DMJD", 8 if toy else 512, "plain + plain depthwise"
    narrow, wide, views = (2, 4, 2) if toy else (256, 512, 128)
    rows = [
        (vit, "dmjd", "recompute", EAGER, narrow),
        (vit, "dmjd", "plain", EAGER, narrow),
        (vit, "transformers", "recompute", EAGER, narrow),
        (conv, "dmjd", "recompute", EAGER, views),
        (conv, "dmjd", both, EAGER, views),
        (conv, "dmjd", "plain depthwise", EAGER, views),
        (conv, "dense reference", "recompute", EAGER, views),
        ("dmjd", "small", "recompute", EAGER, small),
        ("dmjd", "profile", "recompute", EAGER, small),
        ("mae", "small", "recompute", EAGER, small),
        ("dmjd", "small", "recompute", EAGER, 4 * small),
        (vit, "dmjd", "recompute", EAGER, None),
        (vit, "dmjd", "recompute", EAGER, wide),
        (vit, "dmjd", "plain", EAGER, wide),
        (vit, "transformers", "recompute", EAGER, wide),
        ("dmjd", "small", "recompute", COMPILED, small),
        (vit, "dmjd", "recompute", COMPILED, wide),
        (vit, "transformers", "recompute", COMPILED, wide),
        (conv, "dmjd", "recompute", COMPILED, views),
        ("dmjd", "small", "recompute", GRAPHS, small),
        (vit, "dmjd", "recompute", GRAPHS, wide),
        (conv, "dmjd", "recompute", GRAPHS, views),
        ("folder", "small", "recompute", GRAPHS, small),
        ("mae", "small", "recompute", GRAPHS, small),
        (vit, "dmjd", "plain", COMPILED, wide),
        (conv, "dmjd", both, COMPILED, views),
        (conv, "dense reference", "recompute", COMPILED, views),
        ("dmjd", "small", "plain", COMPILED, small),
        ("dmjd", "small", "plain", GRAPHS, small),
        ("dmjd", "profile", "recompute", COMPILED, small),
        ("ViT-B, DMJD", "dmjd", "recompute", COMPILED, views),
        ("ConvViT-B, MAE", "dmjd", "recompute", COMPILED, views),
        (conv, "dmjd", "recompute", EAGER, None),
    ]
    return [Case(*row) for row in rows]


@contextlib.contextmanager
def compiling(mode: str, toy: bool) -> Iterator[None]:
    """Within the block ``torch.compile`` works as a case wants it.

    With ``toy`` the graph is captured, but no code is compiled for it, which takes minutes on a CPU.
    """
    before = torch.compile
    settings = {"backend": "aot_eager"} if toy else {"mode": "reduce-overhead"} if mode == GRAPHS else {}
    torch.compile = functools.partial(before, **settings)
    try:
        yield
    finally:
        torch.compile = before
