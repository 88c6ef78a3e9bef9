"""Fixtures that the torch backend's tests share."""

from tests.small_training import base, data  # noqa: F401
from tests.torture.checkpoints import one_rank  # noqa: F401
