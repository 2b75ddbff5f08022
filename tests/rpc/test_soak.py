from pathlib import Path

import pytest

from tests.rpc.soak import soak

SECONDS = 5.0


@pytest.mark.slow
def test_importers_daemon_and_guest_share_one_store(tmp_path: Path) -> None:
    totals = soak(tmp_path, SECONDS)

    assert min(totals) > 0
