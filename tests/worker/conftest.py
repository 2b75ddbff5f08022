"""Both ways of answering requests, over one store, and a ring."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.directory import Node
from appliance.store.store_reader import StoreReader
from tests.fakes.engine_rig import Rig
from tests.worker.plain_tree import TREE
from tests.worker.twins import Twins, filled_store


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "store"


@pytest.fixture(scope="module")
def nodes(store_path: Path) -> list[Node]:
    return filled_store(store_path, {"tree": TREE})


@pytest.fixture(scope="module")
def twins(store_path: Path, nodes: list[Node]) -> Iterator[Twins]:
    store = StoreReader(store_path)
    pair = Twins(store, nodes)
    yield pair
    pair.close()
    store.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(num=128, regions=((0x10000, 48 << 20),)) as rig:
        yield rig
