"""The store that is served to fuzzers."""

from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.hostile_guest import make_tree


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The path of the store, and the name of its only store path."""
    path = tmp_path_factory.mktemp("store") / "store"
    (name,) = import_tree(path, make_tree(tmp_path_factory.mktemp("tree")))
    return path, name.encode()
