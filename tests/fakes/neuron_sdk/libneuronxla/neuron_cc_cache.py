"""The cache's classes that optimum-neuron wraps with its own; nothing here fetches from
elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from libneuronxla.graphs import cache_path


class CacheUrl:
    def __init__(self, url: str, url_type: str = "fs"):
        self.url, self.url_type = url, url_type

    @classmethod
    def get_cache_url(cls, cache_dir: str | None = None) -> CacheUrl:
        return cls(cache_dir or str(cache_path()))

    def is_s3(self) -> bool:
        return self.url_type == "s3"


class CompileCache:
    def __init__(self, cache_url: CacheUrl):
        self.cache_url, self.cache_path = cache_url, cache_url.url


class CompileCacheFs(CompileCache):
    def exists(self, path: str) -> bool:
        return Path(path).exists()


class CompileCacheS3(CompileCache):
    pass


def create_compile_cache(cache_url: Any) -> CompileCache:
    return CompileCacheFs(cache_url)
