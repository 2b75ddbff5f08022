"""What is left when a daemon or an importer is killed. `crashes.py` takes any number of moments."""

from pathlib import Path

import pytest

from tests.rpc.crashes import kill_daemons, kill_importers

MOMENTS = 6

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [1])
def test_store_is_whole_after_its_daemon_was_killed(tmp_path: Path, seed: int) -> None:
    assert kill_daemons(tmp_path, MOMENTS, seed) > 0


@pytest.mark.parametrize("seed", [1])
def test_store_is_whole_after_its_importer_was_killed(tmp_path: Path, seed: int) -> None:
    assert kill_importers(tmp_path, 2 * MOMENTS, seed) > 0
