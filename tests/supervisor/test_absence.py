"""Guests while there is no supervisor: what they have is read, what they lack waits and is EIO."""

import os
import select
import time
from errno import EIO
from pathlib import Path
from typing import Final

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.fuse_client import ROOT
from tests.fakes.running_command import DEADLINE_S

pytestmark = pytest.mark.slow

SMALL: Final = b"what the cache has"
LARGE: Final = os.urandom(3 << 20)
OTHER: Final = b"another path"
# Twice what a session process waits for the next supervisor.
ABSENCE_DEADLINE_S: Final = 60.0
WAITING, READING = 1, 2  # queues


def read_on(guest: FakeGuest, nodeid: int, num_waiting: int) -> tuple[dict[int, int], int]:
    """Read a cached file until what waits has been answered; return errors, and how many reads."""
    errors: dict[int, int] = {}
    num_reads = 0
    end_s = time.monotonic() + ABSENCE_DEADLINE_S
    poller = select.poll()
    poller.register(guest.rings[WAITING].call_fd, select.POLLIN)
    while len(errors) < num_waiting:
        assert time.monotonic() < end_s, errors
        body = guest.ask(fuse_client.read(nodeid, 0, 4000), queue=READING).body
        assert body == SMALL
        num_reads += 1
        if poller.poll(50):
            guest.rings[WAITING].calls()
        for used in guest.rings[WAITING].poll():
            answer = fuse_client.parse_reply(used.data)
            errors[answer.unique] = answer.error
    return errors, num_reads


def test_what_a_guest_has_is_read_on_and_what_it_lacks_is_eio_after_a_while(
    tmp_path: Path,
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(SMALL)
    (tree / "large").write_bytes(LARGE)
    (other := tmp_path / "other").write_bytes(OTHER)
    name, other_name = (each.encode() for each in import_tree(tmp_path / "store", tree, other))
    options = (f"--state-dir={tmp_path}/state", "--num-request-queues=2")
    with DaemonProcess(uri_of(tmp_path / "store"), tmp_path / "daemon") as daemon:
        first = ApplianceProcess(daemon.unix_uri, tmp_path, *options)
        with FakeGuest(first.connect(), num_request_queues=2) as guest:
            guest.mount()
            top = guest.lookup(ROOT, name)
            small, large = guest.lookup(top, b"small"), guest.lookup(top, b"large")
            assert guest.ask(fuse_client.read(small, 0, 4000)).body == SMALL
            first.process.kill()
            first.process.wait(DEADLINE_S)

            guest.send(fuse_client.lookup(ROOT, other_name, unique=1), queue=WAITING)
            guest.send(fuse_client.read(large, 1 << 20, 4096, unique=2), queue=WAITING)
            errors, num_reads = read_on(guest, small, 2)
            assert errors == {1: EIO, 2: EIO}
            assert num_reads > 50, "a supervisor that comes in time answers instead"

            with ApplianceProcess(daemon.unix_uri, tmp_path, *options):
                found = guest.lookup(ROOT, other_name)
                assert guest.ask(fuse_client.read(found, 0, 4000)).body == OTHER
                body = guest.ask(fuse_client.read(large, 1 << 20, 4096)).body
                assert body == LARGE[1 << 20 :][:4096]
