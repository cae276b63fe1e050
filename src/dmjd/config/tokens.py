"""Settings that follow the tokens of an encoder if they are not given. Imports no torch."""

import re

TOKEN_SETTINGS = ("mask_ratio", "hog_cell")  # those of the recipe folder follow its tokens


def patch_of(encoder: str) -> int:
    """Side of a token in pixels by the name of an encoder; 0 if the name does not say it."""
    found = re.search(r"patch([0-9]{1,3})(?![0-9])", encoder)
    return int(found[1]) if found else 0


def default_block(grid: tuple[int, int]) -> int:
    """Side of a masking block in tokens: 2 if it divides both sides of the grid, else 1."""
    return 2 if grid[0] % 2 == 0 and grid[1] % 2 == 0 else 1


def default_cell(patch_size: int) -> int:
    """Side of a HOG cell in pixels: half the patch if that is a whole number, else a third, else the patch."""
    for parts in (2, 3):
        if patch_size % parts == 0:
            return patch_size // parts
    return patch_size
