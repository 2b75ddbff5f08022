"""The time and memory of a plan grow with the store, and no faster; a bench has the full size."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.collector.collection import CollectOptions, plan
from appliance.store.store import Store
from tests.collector.bench_collection import fill, run_gc

pytestmark = pytest.mark.slow

SMALL, LARGE = 10_000, 60_000


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


def plan_s(path: Path) -> float:
    store = Store.open(path)
    try:
        started_s = time.process_time()
        made = plan(store, CollectOptions(grace_s=0, max_freed_bytes=1 << 50))
        took_s = time.process_time() - started_s
        assert len(made.dead) == len(made.graph.paths)
        return took_s
    finally:
        store.close()


def test_a_plan_takes_time_and_memory_in_proportion(memory: Path) -> None:
    small, large = memory / "small", memory / "large"
    fill(small, SMALL, SMALL // 200)
    fill(large, LARGE, LARGE // 200)
    assert plan_s(large) < 3 * LARGE / SMALL * plan_s(small)
    runs = [run_gc(path, "--dry-run", "--grace", "0") for path in (small, large)]
    # For pages of files there is a bound, see `db.resident_pages`.
    assert (runs[1].anonymous_bytes - runs[0].anonymous_bytes) / (LARGE - SMALL) < 100
