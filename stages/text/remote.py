"""Datasets that are not on this machine: on S3 and on the Hugging Face Hub.

What the far side refuses becomes an InputError that says what to do. Credentials are found by the libraries themselves (AWS_* or a
profile or the instance's role; HF_TOKEN or `hf auth login`).
"""

from __future__ import annotations

import io
import os
from typing import Any
from urllib.parse import urlsplit

from stages.model.hub import from_hub
from stages.run.errors import InputError
from stages.text.formats import table_records
from stages.text.rows import BATCH_ROWS, FORMATS, Source, open_file, open_saved

_TRIES = 3
_STREAM_BUFFER = 2**20


def open_s3(dataset: str, split: str, wanted: list[str]) -> Source:
    """A file or a saved `datasets` folder at s3://BUCKET/KEY, read as it streams in: nothing is copied to the disk."""
    path = dataset.removeprefix("s3://").rstrip("/")
    files = _s3(path.split("/")[0])

    def opened(key: str) -> Any:
        if key.lower().endswith(".parquet"):
            return files.open_input_file(key)  # its index is at its end
        return io.BufferedReader(files.open_input_stream(key), _STREAM_BUFFER)

    try:
        if path.lower().endswith(FORMATS):
            return open_file(dataset, lambda: opened(path), wanted)
        return open_saved(dataset, lambda name: opened(f"{path}/{name}"), split, wanted)
    except FileNotFoundError:
        raise InputError(f"{dataset} does not exist. Check the bucket and the key.") from None
    except OSError as error:
        remedy = "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), AWS_REGION, and s3:GetObject and s3:ListBucket rights."
        raise InputError(f"{dataset} cannot be read ({error}). {remedy}") from None


def _s3(bucket: str) -> Any:
    """pyarrow's S3 client: it comes with pyarrow, where fsspec's needs a package more. Honours AWS_ENDPOINT_URL (MinIO, tests)."""
    from pyarrow import fs

    endpoint = urlsplit(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint.netloc:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError:
            region = None  # no such bucket or no network: the request itself will say which
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)
    where = {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
    return fs.S3FileSystem(region=region, connect_timeout=10, request_timeout=60, retry_strategy=retries, **where)


def open_hub(dataset: str, revision: str, config: str, split: str, wanted: list[str]) -> Source:
    """A dataset of the Hub through `datasets`, which keeps it in its cache; the code that some datasets carry is never run."""
    from datasets import load_dataset

    data = from_hub("dataset", dataset, revision, lambda: load_dataset(dataset, config or None, split=split, revision=revision or None))
    columns = [name for name in data.column_names if name in wanted]
    name = f"{dataset} ({split})"
    if not columns:
        return Source(name, "row", data.column_names, iter(()))
    tables = data.select_columns(columns).with_format("arrow").iter(batch_size=BATCH_ROWS)
    return Source(name, "row", data.column_names, table_records(tables, columns))
