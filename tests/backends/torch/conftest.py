"""Fixtures that the torch backend's tests share."""

import pytest

from stages.backends.torch import package_cache
from tests.small_training import base, data  # noqa: F401
from tests.torture.checkpoints import one_rank  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def no_packages_of_other_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests compile by themselves, and leave nothing in the project's outputs."""
    package_cache.PACKAGES = tmp_path_factory.mktemp("packages")
