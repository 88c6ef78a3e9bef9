"""What the tests that do damage share."""

from __future__ import annotations

from tests.torture.checkpoints import one_rank  # noqa: F401 (a fixture)
