"""Every test of this directory leaves as many descriptors open as it found."""

import gc
from collections.abc import Iterator

import pytest
import uvloop

from tests.vhost.session_rig import num_open_fds


@pytest.fixture(scope="session")
def _first_uvloop() -> None:
    # libuv opens a pipe for signals with a process's first loop and never closes it.
    uvloop.new_event_loop().close()


@pytest.fixture(scope="module")
def _little_to_collect() -> Iterator[None]:
    # All modules of all tests and what came of them are no garbage, and take long to look through.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_fd_leaks(_first_uvloop: None, _little_to_collect: None) -> Iterator[None]:
    gc.collect()  # what other tests left in cycles goes now, not during this one
    before = num_open_fds()
    yield
    assert num_open_fds() == before
