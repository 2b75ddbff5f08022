"""A guest with an empty store."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fs.guest import Guest


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    yield made
    made.close()
