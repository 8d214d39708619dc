"""The private Slurm of these tests, one for the session."""

import os
from collections.abc import Iterator

import pytest
from cluster import Cluster, obstacle


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two idle nodes. Skips where Slurm cannot run, which with REQUIRE_SLURM=1 is a failure."""
    reason = obstacle()
    if reason:
        (pytest.fail if os.environ.get("REQUIRE_SLURM") == "1" else pytest.skip)(reason)
    private = Cluster()
    yield private
    private.close()
