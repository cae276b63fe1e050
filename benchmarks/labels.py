"""Where the labels of a data set come from."""

from pathlib import Path


def labels_of(data: str) -> str:
    """The ``labels`` setting of a data set: "column", "folder", or "none" if the set has its own."""
    path = Path(data).expanduser()
    if not path.exists():
        return "none" if data == "cifar10" else "column"
    return "column" if path.is_file() or list(path.glob("*.parquet")) else "folder"
