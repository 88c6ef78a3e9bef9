"""What the tests that do damage share."""

from __future__ import annotations

from tests.small_training import base, data  # noqa: F401 (fixtures)
from tests.torture.checkpoints import one_rank  # noqa: F401 (a fixture)
