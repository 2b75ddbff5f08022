"""Checks that every test in this directory leaves as many descriptors open as it found."""

import gc
from collections.abc import Iterator

import pytest
import uvloop

from tests.vhost.session_rig import num_open_fds


@pytest.fixture(scope="session")
def _first_uvloop() -> None:
    # With the first loop of a process, libuv opens a pipe for signals that it never closes.
    uvloop.new_event_loop().close()


@pytest.fixture(scope="module")
def _little_to_collect() -> Iterator[None]:
    # The objects of all modules and tests are not garbage, and each collection would traverse them.
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_fd_leaks(_first_uvloop: None, _little_to_collect: None) -> Iterator[None]:
    gc.collect()  # garbage of other tests must not be collected during this one
    before = num_open_fds()
    yield
    assert num_open_fds() == before
