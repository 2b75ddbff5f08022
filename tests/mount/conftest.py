"""One store and one mount of it for the tests of a module that change neither."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.mounted import Mounted


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "store"


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture(scope="module", params=["place", "content"])
def inodes(request: pytest.FixtureRequest) -> str:
    """What st_ino of `mounted` tells apart."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture(scope="module")
def mounted(
    store: Path, inodes: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Mounted]:
    path = tmp_path_factory.mktemp("mount") / "mnt"
    path.mkdir()
    with Mounted(store, path, "--list-root", f"--inodes={inodes}") as process:
        yield process
