"""What is left when a daemon or an importer is killed. `crashes.py` takes any number of moments."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.importer.trees import small_disk
from tests.rpc.crashes import kill_daemons, kill_daemons_of_importers, kill_importers

MOMENTS = 200
MOMENTS_UNDER_LOAD = 6

pytestmark = pytest.mark.slow


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory: it is processes that are killed here, not the host."""
    with small_disk(tmp_path / "disk", "1g") as disk:
        yield disk


@pytest.mark.parametrize("seed", [1])
def test_store_is_whole_after_its_daemon_was_killed(tmp_path: Path, seed: int) -> None:
    assert kill_daemons(tmp_path, MOMENTS_UNDER_LOAD, seed).num_objects > 0


@pytest.mark.parametrize("seed", [1])
def test_import_whose_daemon_was_killed_can_be_repeated(memory: Path, seed: int) -> None:
    assert kill_daemons_of_importers(memory, MOMENTS, seed).num_killed > MOMENTS // 3


@pytest.mark.parametrize("seed", [1])
def test_import_that_was_killed_can_be_repeated(memory: Path, seed: int) -> None:
    assert kill_importers(memory, MOMENTS, seed).num_killed > MOMENTS // 3
