"""The store that tests with fake guests serve, and a guest of it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hostile_guest import make_tree

SERVED = ("--num-request-queues=1",)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The path of the store, and the name of its only store path."""
    path = tmp_path_factory.mktemp("store") / "store"
    (name,) = import_tree(path, make_tree(tmp_path_factory.mktemp("tree")))
    return path, name.encode()


@pytest.fixture
def first_guest(
    store: tuple[Path, bytes], tmp_path: Path
) -> Iterator[tuple[FakeGuest, ApplianceProcess]]:
    """A guest, and the first of the supervisors that a test has follow each other."""
    first = ApplianceProcess(store[0], tmp_path, *SERVED)
    served = FakeGuest(first.connect())
    served.mount()
    with contextlib.closing(served):
        yield served, first
    first.stop()
