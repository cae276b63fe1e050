"""Sets of the Hugging Face hub."""

import pytest

from dmjd.data.sources.registry import open_source


@pytest.mark.parametrize("name", ["nobody-/no-such-set-", "nosuchsetofimages"])
def test_sets_that_the_hub_does_not_have(name):
    with pytest.raises(ValueError, match=r"could not be loaded from the Hugging Face hub .*check the name and the net"):
        open_source(name)
