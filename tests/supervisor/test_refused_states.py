"""States of a device that are damaged, hostile, or come at the wrong time."""

import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.errors import VhostError
from appliance.protos.device_state_pb2 import DeviceState, SavedGrant
from appliance.session.device_state import MAGIC, STATE_MAX, VERSION, parse_untrusted
from appliance.vhost._vhost_wire import StateDirection
from tests.fakes.appliance_process import ApplianceProcess
from tests.supervisor.moved_guests import (
    Stores,
    check_all,
    new_guest,
    serve,
    wait_for_log,
    walk,
)

pytestmark = pytest.mark.slow

FAILED = 0x101
HEADER = struct.Struct("<8sIIQ")


def packed(message: bytes, *, magic: bytes = MAGIC, version: int = VERSION) -> bytes:
    return HEADER.pack(magic, version, zlib.crc32(message), len(message)) + message


def with_grants(stores: Stores, *bases: int, next_base: int = 1 << 40) -> bytes:
    """Return a state with grants at these bases, each of a path that is there."""
    names = [stores.first, stores.second, stores.link]
    grants = [
        SavedGrant(base=base, span=1, name=name, kind=ord("l"), digest=bytes(32))
        for base, name in zip(bases, names, strict=False)
    ]
    state = DeviceState(next_base=next_base, grants=grants)
    return packed(state.SerializeToString())


# With what parsing says of them; `test_restoring.py` has what the supervisor says of the others.
HOSTILE: dict[str, tuple[Callable[[bytes, Stores], bytes], str]] = {
    "empty": (lambda _good, _stores: b"", "has 0 bytes"),
    "a header cut short": (lambda good, _stores: good[:20], "has 20 bytes"),
    "cut short": (lambda good, _stores: good[:-1], "after its header, expected"),
    "longer": (lambda good, _stores: good + b"x", "after its header, expected"),
    "huge": (lambda _good, _stores: bytes(STATE_MAX + 1), f"more than {STATE_MAX} bytes"),
    "a huge length": (
        lambda _good, _stores: HEADER.pack(MAGIC, VERSION, 0, 2**64 - 1),
        "expected 18446744073709551615",
    ),
    "of another program": (lambda good, _stores: b"virtiofs" + good[8:], "not one of this program"),
    "of a later version": (
        lambda good, _stores: packed(good[24:], version=2),
        "has version 2; this release reads version 1",
    ),
    "damaged": (lambda good, _stores: good[:-1] + bytes([good[-1] ^ 1]), "checksum is wrong"),
    "random": (lambda _good, _stores: os.urandom(1000), "not one of this program"),
    "no message": (lambda _good, _stores: packed(b"\xff" * 50), "is no DeviceState"),
    "of a later kernel": (
        lambda _good, _stores: packed(
            DeviceState(init={"minor": 99}, next_base=2).SerializeToString()  # type: ignore[arg-type]
        ),
        "speaks FUSE 7.99",
    ),
    "with unknown flags": (
        lambda _good, _stores: packed(
            DeviceState(
                init={"minor": 38, "flags": 1 << 63},  # type: ignore[arg-type]
                next_base=2,
            ).SerializeToString()
        ),
        "promised FUSE flags 0x8000000000000000",
    ),
    "base 0": (lambda _good, stores: with_grants(stores, 0), ""),
    "a store path as root": (lambda _good, stores: with_grants(stores, 1), ""),
    "overlapping": (lambda _good, stores: with_grants(stores, 9, 9), ""),
    "descending": (lambda _good, stores: with_grants(stores, 9, 5), ""),
    "other content": (lambda _good, stores: with_grants(stores, 9), ""),
    "a base beyond the numbers": (lambda _good, stores: with_grants(stores, 2**64 - 1), ""),
    "a taken next base": (lambda _good, stores: with_grants(stores, next_base=1), ""),
    "a huge next base": (lambda _good, stores: with_grants(stores, next_base=2**64 - 1), ""),
}


def test_what_is_no_state_of_a_guest_is_refused_and_changes_nothing(
    here: ApplianceProcess, stores: Stores
) -> None:
    guest, vmm = new_guest(here)
    with guest:
        known = walk(guest, stores)
        good, bases = vmm.save()
        for what, (make, error) in HOSTILE.items():
            state = make(good, stores)
            assert vmm.front_end.load_state(state) == 1, what
            if error and len(state) <= STATE_MAX:
                with pytest.raises(VhostError, match=re.escape(error)):
                    parse_untrusted(state)
        # The log has the first of them, and counts others like them.
        wait_for_log(here, "refused: CHECK_DEVICE_STATE: the device state has 0 bytes")
        assert vmm.front_end.check_device_state() == 1  # nothing was transferred since
        vmm.start(guest.memory, guest.rings, bases)
        check_all(guest, known, stores)


def test_the_state_of_a_session_whose_rings_run_is_refused(stores: Stores, tmp_path: Path) -> None:
    with serve(stores.here, tmp_path / "here") as here, (made := new_guest(here))[0] as guest:
        vmm = made[1]
        known = walk(guest, stores)
        for direction in StateDirection:
            reading, writing = os.pipe()
            fd = writing if direction == StateDirection.SAVE else reading
            assert vmm.front_end.set_device_state_fd(fd, direction) == FAILED
            os.close(reading)
            os.close(writing)
        assert vmm.front_end.check_device_state() == 1
        with (Path(os.devnull)).open() as null:
            vmm.stop()
            assert vmm.front_end.set_device_state_fd(null.fileno(), 2) == FAILED
            assert vmm.front_end.set_device_state_fd(null.fileno(), 0, phase=1) == FAILED
        wait_for_log(here, "rings [0, 1] run")
        wait_for_log(here, "direction 2, expected 0 (save) or 1 (load)")
        wait_for_log(here, "phase 1, expected 0")
        assert known.first
