"""Read the records of Parquet files and Arrow streams; pyarrow is imported only for these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from stages.run.errors import InputError
from stages.text.formats import Problem, Record

_BATCH_ROWS = 1000


def parquet_records(
    source: Any, wanted: Iterable[str]
) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """Column names of a Parquet file (a path or an open file), and its records with the `wanted`
    columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source)
        names = file.schema_arrow.names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"this is not a Parquet file ({error}).") from None
    columns = [name for name in names if name in set(wanted)]
    return names, table_records(file.iter_batches(batch_size=_BATCH_ROWS, columns=columns), columns)


def arrow_records(
    file: Any, wanted: Iterable[str]
) -> tuple[list[str], Iterator[tuple[int, Record]]]:
    """Column names of an open Arrow stream (a data file of a saved dataset), and its records with
    the `wanted` columns."""
    import pyarrow as pa

    try:
        stream = pa.ipc.open_stream(file)
        names = stream.schema.names
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"this is not an Arrow stream ({error}).") from None
    return names, table_records(stream, [name for name in names if name in set(wanted)])


def table_records(tables: Iterable[Any], columns: list[str]) -> Iterator[tuple[int, Record]]:
    """Records of Arrow tables or record batches with `columns`, numbered from 1."""
    import pyarrow as pa

    number = 0
    try:
        for table in tables:
            selected = table.select(columns)
            as_bytes = [
                field.name
                for field in selected.schema
                if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
            ]
            # A stream is not checked as it is read: a wrong offset would read other memory.
            selected.validate(full=True)
            for begin in range(0, selected.num_rows, _BATCH_ROWS):
                for record in selected.slice(begin, _BATCH_ROWS).to_pylist():
                    number += 1
                    yield number, _decoded(record, as_bytes) if as_bytes else record
    except (pa.ArrowException, UnicodeDecodeError, OSError, MemoryError) as error:
        reason = str(error) or "it needs more memory than is available"
        yield (
            number + 1,
            Problem(
                f"or one of the {_BATCH_ROWS} after it cannot be read ({reason}). The file seems "
                "to be damaged."
            ),
        )


def _decoded(record: dict[str, Any], columns: list[str]) -> Record:
    """The record with the text that its `columns` hold as bytes: polars and Spark write such."""
    for name in columns:
        try:
            record[name] = None if record[name] is None else record[name].decode()
        except UnicodeDecodeError as error:
            byte = record[name][error.start]
            return Problem(
                f"has bytes in column {name!r} that are not UTF-8 text: 0x{byte:02x} is byte "
                f"{error.start + 1}."
            )
    return record
