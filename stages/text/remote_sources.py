"""Open datasets on S3 and on the Hugging Face Hub.

A refusal by the server becomes an InputError with a remedy. The libraries find the credentials
(AWS_*, a profile or the instance's role; HF_TOKEN or `hf auth login`).
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stages.model.hub import from_hub
from stages.model.hub_cache import commit_of
from stages.run.errors import InputError
from stages.text.sources import FORMATS, Source, open_file, open_folder, placed
from stages.text.tables import table_records

_TRIES = 5  # of each request, by the client, with growing pauses
_LONGEST_SILENCE = 20  # seconds without a byte before a request is tried again
_STREAM_BUFFER = 2**20
_BATCH_EXAMPLES = 1000


def open_s3(dataset: str, split: str, wanted: list[str]) -> Source:
    """A file, a folder of files or a saved `datasets` folder at s3://BUCKET/KEY, read as a stream:
    nothing is copied to the disk."""
    path = dataset.removeprefix("s3://").rstrip("/")
    files = s3_files(path.split("/")[0])

    def open_binary(key: str) -> Any:
        if key.lower().endswith(".parquet"):
            return files.open_input_file(key)  # its index is at its end
        stream = files.open_input_stream(key, compression=None)
        return io.BufferedReader(stream, _STREAM_BUFFER)

    def names() -> list[str]:
        from pyarrow import fs

        found = files.get_file_info(fs.FileSelector(path, recursive=True))
        below = [one.path.removeprefix(f"{path}/") for one in found if one.type == fs.FileType.File]
        return [name for name in below if not re.search(r"(^|/)\.", name)]

    try:
        if path.lower().endswith(FORMATS):
            source = open_file(dataset, lambda: open_binary(path), wanted)
            return source.without_splits(split)
        return open_folder(
            dataset, names, lambda name: open_binary(f"{path}/{name}"), split, wanted
        )
    except FileNotFoundError:
        raise InputError(f"{dataset} does not exist. Check the bucket and the key.") from None
    except OSError as error:
        raise InputError(f"{dataset} cannot be read ({error}). {s3_remedy(str(error))}") from None


def s3_remedy(error: str, writing: bool = False) -> str:
    """The remedy for an error of pyarrow's S3 client, whose errors differ only in their text."""
    if "NETWORK_CONNECTION" in error:
        local = "" if writing else ", or copy the dataset to this machine and name it there"
        return f"Check the network and AWS_ENDPOINT_URL{local}."
    if "NO_SUCH_BUCKET" in error:
        return "The bucket does not exist. Check its name, or create it."
    if "HTTP status 5" in error or "SLOW_DOWN" in error:
        return f"S3 failed or asked for fewer requests {_TRIES} times in a row. Try again later."
    if "HTTP status 301" in error or "HTTP status 307" in error:
        return "The bucket is in another region. Set AWS_REGION to it."
    rights = "right s3:PutObject" if writing else "rights s3:GetObject and s3:ListBucket"
    return (
        "Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN (or AWS_PROFILE), "
        f"which may have expired, AWS_REGION, and the {rights}."
    )


def s3_files(bucket: str) -> Any:
    """pyarrow's S3 client, which needs no further package as fsspec's does. Honours
    AWS_ENDPOINT_URL (MinIO, tests)."""
    from pyarrow import fs

    endpoint = urlsplit(
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    )
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region and not endpoint.netloc:
        try:
            region = fs.resolve_s3_region(bucket)
        except OSError:
            region = None  # no such bucket or no network: the request reports which
    retries = fs.AwsStandardS3RetryStrategy(max_attempts=_TRIES)
    location = (
        {"endpoint_override": endpoint.netloc, "scheme": endpoint.scheme} if endpoint.netloc else {}
    )
    return fs.S3FileSystem(
        region=region,
        connect_timeout=10,
        request_timeout=_LONGEST_SILENCE,
        retry_strategy=retries,
        **location,
    )


def open_hub(dataset: str, revision: str, config: str, split: str, wanted: list[str]) -> Source:
    """A dataset of the Hub through `datasets`, which caches it. A dataset's code is never run."""
    from datasets import load_dataset
    from huggingface_hub import HfFileSystem

    # A second try prepares the tables again: the first may have read a file that was cut off.
    modes = iter([None])

    def load() -> Any:
        HfFileSystem.clear_instance_cache()  # it caches a refused listing as an empty one
        mode = next(modes, "reuse_cache_if_exists")
        return load_dataset(
            dataset, config or None, split=split, revision=revision or None, download_mode=mode
        )

    data = from_hub("dataset", dataset, revision, load)
    _check_commit(dataset, revision, data)
    columns = [name for name in data.column_names if name in wanted]
    name = f"{dataset} ({split})"
    if not columns:
        return Source(name, data.column_names, iter(()))
    tables = data.select_columns(columns).with_format("arrow").iter(batch_size=_BATCH_EXAMPLES)
    records = placed(name, "row", table_records(tables, columns))
    return Source(name, data.column_names, records)


def _check_commit(dataset: str, revision: str, data: Any) -> None:
    """Raise InputError unless `data` is of the commit that `revision` names.

    Without an answer from the Hub, `datasets` takes what it prepared last, of any revision. The
    folder's name is its commit.
    """
    commit = commit_of("dataset", dataset, revision)
    cached = {Path(file["filename"]).parent.name for file in data.cache_files}
    if cached and cached != {commit}:
        commits = ", ".join(sorted(cached))
        remedy = f"Run it once while the Hub can be reached, or set DATASET_REVISION={commits}."
        raise InputError(
            f"DATASET={dataset}: the cache holds commit {commits} and not "
            f"DATASET_REVISION={revision or 'main'}. {remedy}"
        )
