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


@pytest.fixture(autouse=True)
def _no_fd_leaks(_first_uvloop: None) -> Iterator[None]:
    gc.collect()  # what other tests left in cycles goes now, not during this one
    before = num_open_fds()
    yield
    assert num_open_fds() == before
