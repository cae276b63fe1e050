"""What the columns of a table hold: encoded images, paths or labels."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

PATH_NAMES = (
    "path",
    "file_path",
    "filepath",
    "file",
    "filename",
    "file_name",
    "image_path",
    "image",
    "img_path",
    "img",
)

LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow type is text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_list_table(file: Path) -> bool:
    """Whether a parquet file lists paths: it holds no encoded images, but texts under a usual name of paths."""
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return False
    texts = {f.name.strip().lower() for f in schema if is_text(f.type) or _is_text_dictionary(f.type)}
    return not any(is_encoded_image(f.type) for f in schema) and bool(texts & set(PATH_NAMES))


def is_encoded_image(kind: pa.DataType) -> bool:
    """Whether an Arrow type can hold encoded images: bytes, or a struct with a field of them."""
    if pa.types.is_struct(kind):
        # Without any bytes, the images are files, whose paths are in another field.
        return any(f.name == "bytes" and (_is_bytes(f.type) or pa.types.is_null(f.type)) for f in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text_dictionary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_dictionary(kind) and is_text(kind.value_type))
