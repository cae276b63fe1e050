"""Labels from a column of a table or list: whole numbers, texts and truth values; anything else is an error."""

import re
from typing import Any

import numpy as np

from dmjd.data.sources.table_columns import LABEL_NAMES
from dmjd.text import printable, shortened

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?|nan", re.IGNORECASE)


def column_labels(
    table: Any, name: str, image_column: str, label_column: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """[n] int64 labels and class names, from the declared label column or the first with a usual name.

    Args:
        table: a ``datasets.Dataset``.
        name: its name in messages.
        image_column: the column of the images, which holds no labels.
        label_column: the column to take instead.

    Raises:
        ValueError: if there is no such column, a row has no label, or the values are not classes.
    """
    import datasets  # slow to import

    declared = [c for c, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [c for c in LABEL_NAMES if c in table.column_names and c != image_column]
    candidates = [c for c in usual if c in declared] + usual + declared
    if label_column is not None:
        candidates = [label_column] if label_column in table.column_names else []
    if not candidates:
        columns = ", ".join(map(printable, table.column_names))
        wanted = ", ".join(LABEL_NAMES) if label_column is None else repr(label_column)
        raise ValueError(
            f"{name} has no label column ({printable(wanted)}); it has {columns}: pass --label-column NAME"
        )
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


def optional_labels(column: Any, where: str) -> tuple[np.ndarray, list[str]]:
    """[n] int64 labels, -1 where there is none, and class names, of a column of a list.

    Null, an empty text and a negative number are no label. Texts are numbers if all of them are, so that the classes 2
    and 10 are in this order.

    Args:
        column: a ``pyarrow.Array``.
        where: its name in messages.

    Raises:
        ValueError: if no row has a label, or the values are not classes.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if not _are_classes(column.type) and not pa.types.is_null(column.type):
        raise ValueError(_not_classes(where, column.type))
    encoded = pc.dictionary_encode(column)
    codes = pc.fill_null(encoded.indices, -1).to_numpy()
    values = [_plain(value, where) for value in encoded.dictionary.to_pylist()]
    texts = [value for value in values if isinstance(value, str) and value]
    if texts and all(_NUMBER.fullmatch(text) for text in texts):
        values = [float(value) if isinstance(value, str) and value else value for value in values]
    kept = [_class_of(value, where) for value in values]
    classes = sorted({value for value in kept if value is not None})
    if not classes:
        raise ValueError(f"{where}: no row has a label")
    index = {value: number for number, value in enumerate(classes)}
    numbers = np.array([-1 if value is None else index[value] for value in kept] + [-1], dtype=np.int64)
    return numbers[codes], [str(value) for value in classes]


def _plain(value: Any, where: str) -> Any:
    """A value without the spaces around a text."""
    return (
        (_text(value, where) if isinstance(value, bytes) else value).strip()
        if isinstance(value, str | bytes)
        else value
    )


def _class_of(value: Any, where: str) -> Any:
    """A value as a class, or None if it is no label."""
    if value is None or value == "" or value != value:  # the last one is not a number
        return None
    if isinstance(value, float):
        value = int(_whole(np.array([value]), where)[0])
    return None if isinstance(value, int) and not isinstance(value, bool) and value < 0 else value


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
        raise ValueError(_not_classes(where, column.type))
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


def _not_classes(where: str, kind: Any) -> str:
    return f"{where} holds values of type {shortened(kind, 60)}: a label is a whole number, a text or a truth value"


def _without_label(where: str, count: int, missing: np.ndarray) -> str:
    first = int(np.flatnonzero(missing)[0])
    return f"{where}: {count} of {len(missing)} rows have no label, row {first} for one; remove them from the table"
