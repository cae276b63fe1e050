"""Labels from a column of a table: whole numbers, texts and truth values; anything else is an error."""

from typing import Any

import numpy as np

from dmjd.text import printable

_LABEL_NAMES = ("label", "labels", "fine_label", "class", "target")


def column_labels(table: Any, name: str, image_column: str) -> tuple[np.ndarray, list[str]]:
    """[n] int64 labels and class names, from the declared label column or the first with a usual name.

    Args:
        table: a ``datasets.Dataset``.
        name: its name in messages.
        image_column: the column of the images, which holds no labels.

    Raises:
        ValueError: if there is no such column, a row has no label, or the values are not classes.
    """
    import datasets  # slow to import

    declared = [c for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [c for c in _LABEL_NAMES if c in table.column_names and c != image_column]
    candidates = [c for c in usual if c in declared] + usual + declared
    if not candidates:
        columns = ", ".join(map(printable, table.column_names))
        raise ValueError(f"{name} has no label column ({', '.join(_LABEL_NAMES)}); it has {columns}")
    holding_classes = [c for c in candidates if _are_classes(table.data.schema.field(c).type)]
    chosen = (holding_classes + candidates)[0]
    where = f"{name}: column '{printable(chosen)}'"
    values = _values(table.data.column(chosen), where)
    if chosen in declared:
        names = list(table.features[chosen].names)
        if values.dtype.kind in "iu":
            if len(values) and int(values.max()) >= len(names):
                raise ValueError(f"{where} has the label {int(values.max())}, but names only {len(names)} classes")
            return values.astype(np.int64), names
    classes, labels = np.unique(values, return_inverse=True)
    return labels.astype(np.int64), [str(value) for value in classes]


def _are_classes(kind: Any) -> bool:
    """Whether the values of an Arrow type can be classes."""
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(kind):
        return _are_classes(kind.value_type)
    texts = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    encoded = types.is_binary(kind) or types.is_large_binary(kind)
    return texts or encoded or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)


def _values(column: Any, where: str) -> np.ndarray:
    """The labels of a column, [n] of whole numbers, truth values or texts."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type) or column.null_count:
        raise ValueError(_without_label(where, column.null_count, column.is_null().to_numpy()))
    if not _are_classes(column.type):
        kind = str(column.type)
        kind = kind if len(kind) <= 60 else f"{kind[:57]}..."
        raise ValueError(f"{where} holds values of type {kind}: a label is a whole number, a text or a truth value")
    values = column.to_numpy()
    if values.dtype.kind == "f":
        values = _whole(values, where)
    if values.dtype.kind in "iu" and len(values) and values.min() < 0:
        raise ValueError(_without_label(where, int((values < 0).sum()), values < 0))
    if pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        values = np.array([_text(value, where) for value in values], dtype=object)
    if values.dtype == object:
        blank = np.array([not str(value).strip() for value in values])
        if blank.any():
            raise ValueError(_without_label(where, int(blank.sum()), blank))
    return values


def _whole(values: np.ndarray, where: str) -> np.ndarray:
    """Floats as integers: software that knows no missing integers writes 3 as 3.0."""
    values = values.astype(np.float64)
    if np.isnan(values).any():
        raise ValueError(_without_label(where, int(np.isnan(values).sum()), np.isnan(values)))
    fractions = values[(values != np.floor(values)) | (np.abs(values) > 2**53)]
    if len(fractions):
        raise ValueError(f"{where} holds numbers such as {fractions[0]:g}, which are not classes")
    return values.astype(np.int64)


def _text(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where} holds bytes that are not UTF-8 text, and no classes") from None


def _without_label(where: str, count: int, missing: np.ndarray) -> str:
    first = int(np.flatnonzero(missing)[0])
    return f"{where}: {count} of {len(missing)} rows have no label, row {first} for one; remove them from the table"
