"""Figures as users get them."""

import matplotlib
import pytest


@pytest.fixture(autouse=True)
def _resolution():
    """The resolution of the figure; other tests draw fewer pixels."""
    with matplotlib.rc_context({"savefig.dpi": "figure"}):
        yield
