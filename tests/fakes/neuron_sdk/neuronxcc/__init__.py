"""The compiler's version, which names its folder in the cache."""

import only_in_name  # noqa: F401

__version__ = "2.21.33363.0+82129205"
