"""The stores that tests with fake guests serve, and a guest of one."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hostile_guest import make_tree
from tests.supervisor.moved_guests import Stores, serve

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


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Stores:
    directory = tmp_path_factory.mktemp("stores")
    trees = {}
    for name in ("first", "second", "other"):
        trees[name] = directory / name
        (trees[name] / "sub" / "deep").mkdir(parents=True)
        (trees[name] / "small").write_bytes(name.encode())
        (trees[name] / "sub" / "deep" / "file").write_bytes(b"deep in " + name.encode())
    trees["link"] = directory / "link"
    trees["link"].symlink_to("first/small")
    here, there, poorer = (directory / name for name in ("here", "there", "poorer"))
    first, second, link = import_tree(here, trees["first"], trees["second"], trees["link"])
    import_tree(there, trees["other"], trees["link"], trees["second"], trees["first"])
    import_tree(poorer, trees["link"], trees["other"], trees["first"])
    return Stores(here, there, poorer, first.encode(), second.encode(), link.encode())


@pytest.fixture(scope="module")
def here(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApplianceProcess]:
    with serve(stores.here, tmp_path_factory.mktemp("served") / "here") as process:
        yield process


@pytest.fixture(scope="module")
def there(stores: Stores, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApplianceProcess]:
    with serve(stores.there, tmp_path_factory.mktemp("served") / "there") as process:
        yield process
