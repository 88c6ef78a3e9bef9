"""A fixture that the torch backend's tests share."""

from tests.torture.checkpoints import one_rank  # noqa: F401 (a fixture)
