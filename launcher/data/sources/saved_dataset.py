"""A folder that `datasets.save_to_disk` wrote, and reading ranges of what `datasets` has loaded."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from launcher.data.sources import files
from launcher.data.sources.arrow_rows import python_rows
from launcher.data.sources.ranges import File, Row, Span
from launcher.errors import DataError

_BATCH_ROWS = 1000


def whole(file: File) -> Span:
    """All rows."""
    return Span(0, len(_loaded(file)))


def spans(file: File, whole: Span, num_rows: int) -> Iterator[Span]:
    """`whole` in parts of `num_rows`."""
    return even_spans(whole, num_rows)


def rows(file: File, span: Span) -> Iterator[Row]:
    """The rows of `span`, with their number in the data set."""
    return dataset_rows(_loaded(file), file.name, span)


def even_spans(whole: Span, num_rows: int) -> Iterator[Span]:
    """`whole` in parts of `num_rows`."""
    assert whole.stop is not None
    for start in range(whole.start, whole.stop, num_rows):
        yield Span(start, min(start + num_rows, whole.stop))


def dataset_rows(dataset: Any, name: str, span: Span) -> Iterator[Row]:
    """Rows of a datasets.Dataset. Pictures and sound stay the bytes they are: decoding them needs more packages."""
    tables = dataset.with_format("arrow")
    stop = len(dataset) if span.stop is None else span.stop
    for start in range(span.start, stop, _BATCH_ROWS):
        yield from python_rows(tables[start : min(start + _BATCH_ROWS, stop)], name, start)


@lru_cache(maxsize=4)
def _loaded(file: File) -> Any:
    # Imported here because it takes seconds, which a .jsonl file should not cost.
    import datasets

    path = Path(file.name)
    if files.stamp(path) != file.stamp:
        raise DataError(f"{path}: it has changed since the preparation began", hint="start again")
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a folder written by datasets.save_to_disk: {error}",
            hint="save the data set again with save_to_disk",
        ) from error
