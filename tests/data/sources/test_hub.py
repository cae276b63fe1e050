"""Sets of the Hugging Face hub."""

import pytest

from dmjd.data.sources.registry import open_source


@pytest.mark.parametrize("name", ["nobody-/no-such-set-", "nosuchsetofimages"])
def test_sets_that_the_hub_does_not_give(name):
    with pytest.raises(ValueError, match=r"the Hugging Face hub did not give it .*check the name and the network"):
        open_source(name)
