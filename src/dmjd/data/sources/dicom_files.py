"""The DICOM files of a folder: recognized by content, and each frame an image: ``scan.dcm#1``, ``scan.dcm#2``, ..."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dmjd.data.sources.paths import EXTENSIONS
from dmjd.images.dicom import EXTENSIONS as DICOM_EXTENSIONS
from dmjd.images.dicom import MISSING_EXTRA, check_installed, count_frames
from dmjd.text import printable
from dmjd.warning import DMJDWarning

_OTHERS = tuple(ending for ending in EXTENSIONS if ending not in DICOM_EXTENSIONS)

_THREADS = 16  # waits for a network drive overlap


def with_frames(root: Path, paths: list[str]) -> list[str]:
    """Replace DICOM files of several frames by their frames, and leave out what is neither an image nor DICOM.

    Args:
        root: a folder.
        paths: in it, relative; also of files that may be DICOM by their names.

    Raises:
        ValueError: if all images are DICOM files and pydicom is missing.
    """
    candidates = [path for path in paths if not path.lower().endswith(_OTHERS)]
    if not candidates:
        return paths
    with ThreadPoolExecutor(_THREADS) as pool:
        counts = pool.map(lambda path: count_frames(os.path.join(root, path)), candidates, chunksize=64)
        found = dict(zip(candidates, counts, strict=True))
    dicom = [path for path, count in found.items() if count is not None]
    if dicom and not _is_installed(root, dicom, others=len(paths) > len(candidates)):
        found |= dict.fromkeys(dicom, 0)
    elif empty := [path for path in dicom if found[path] == 0]:
        text = f"{len(empty)} DICOM files without an image, {printable(root / empty[0])} for one, are left out"
        warnings.warn(text, DMJDWarning, stacklevel=5)
    images = []
    for path in paths:
        count = found.get(path, 1)
        if count is None:  # by its content no DICOM: an unreadable image, if its name says that it is one
            count = int(path.lower().endswith((*EXTENSIONS, *DICOM_EXTENSIONS)))
        images += [path] * count if count < 2 else [f"{path}#{number}" for number in range(1, count + 1)]
    return images


def check_dicom(name: str) -> None:
    """Raise ValueError for a list, of this name, that names DICOM files, if pydicom is missing."""
    try:
        check_installed()
    except ValueError as error:
        raise ValueError(f"{printable(name)} names DICOM files. {error}") from None


def _is_installed(root: Path, files: list[str], others: bool) -> bool:
    """Whether pydicom is; if not, a warning where there are other images, else an error."""
    try:
        check_installed()
    except ValueError:
        text = f"{printable(root)} holds {len(files)} DICOM files, {printable(files[0])} for one. {MISSING_EXTRA}"
        if not others:
            raise ValueError(text) from None
        warnings.warn(f"{text}. They are left out", DMJDWarning, stacklevel=6)
        return False
    return True
