"""NARs that wait for their narinfos: shared, forgotten after a while, and never in use then."""

import hashlib
import io

import pytest

from appliance.errors import InvalidRequestError, ServiceLimitError
from appliance.http_cache.pending_nars import DiskBudget, NarReceiver, PendingNar, PendingNars
from appliance.nix.hashes import NixHash
from appliance.nix.nar import NarWriter
from appliance.nix.store_path import encode_base32

HASH = NixHash("sha256", bytes(32))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def pending() -> PendingNar:
    return PendingNar(io.BytesIO(), HASH, 1, HASH, 1, "none")


def is_closed(nar: PendingNar) -> bool:
    return nar.file.closed


def test_equal_nars_of_two_paths_share_a_file() -> None:
    nars = PendingNars()
    first, second = pending(), pending()
    nars.add("url", first)
    nars.add("url", second)
    assert is_closed(second)
    for is_done in (False, True):
        assert nars.borrow("url") is first
        nars.give_back("url", is_done=is_done)
    assert not is_closed(first)
    nars.borrow("url")
    nars.give_back("url", is_done=True)
    assert is_closed(first)
    with pytest.raises(InvalidRequestError):
        nars.borrow("url")


def test_those_whose_narinfo_does_not_come_are_dropped() -> None:
    clock = Clock()
    nars = PendingNars(clock=clock)
    left, used = pending(), pending()
    nars.add("left", left)
    nars.add("used", used)
    nars.borrow("used")
    clock.now_s = 3599
    nars.check_room()
    assert not is_closed(left)
    clock.now_s = 3601
    nars.check_room()
    assert is_closed(left)
    assert not is_closed(used)
    nars.close()
    assert is_closed(used)


def test_only_so_many_may_wait() -> None:
    nars = PendingNars()
    for number in range(256):
        nars.check_room()
        nars.add(str(number), pending())
    with pytest.raises(ServiceLimitError):
        nars.check_room()
    nars.close()


def test_those_whose_narinfo_was_refused_go_sooner() -> None:
    clock = Clock()
    nars = PendingNars(clock=clock)
    refused, waiting = pending(), pending()
    nars.add("refused", refused)
    nars.add("waiting", waiting)
    nars.borrow("refused")
    nars.give_back("refused", is_done=False)
    clock.now_s = 59
    nars.drop_old()
    assert not is_closed(refused)
    clock.now_s = 61
    nars.drop_old()
    assert is_closed(refused)
    assert not is_closed(waiting)
    nars.close()


def test_they_give_way_to_others() -> None:
    nars = PendingNars()
    opened = [pending() for _ in range(256)]
    for number, nar in enumerate(opened):
        nars.add(str(number), nar)
    nars.borrow("7")
    nars.give_back("7", is_done=False)
    nars.check_room()
    assert [number for number, nar in enumerate(opened) if is_closed(nar)] == [7]
    nars.close()


def test_a_nar_is_received_in_any_pieces() -> None:
    out = bytearray()
    writer = NarWriter(out.extend)
    writer.file(b"content", executable=False)
    writer.finish()
    expected = encode_base32(hashlib.sha256(out).digest())
    for size in (1, 7, len(out)):
        receiver = NarReceiver(expected, "none", None, DiskBudget())
        for start in range(0, len(out), size):
            receiver.receive(bytes(out[start : start + size]))
        nar = receiver.finish()
        assert (nar.nar_size, nar.file_size, nar.nar_hash) == (len(out), len(out), nar.file_hash)
        nar.file.close()


def test_nars_take_no_more_disk_than_there_is_for_them() -> None:
    budget = DiskBudget(100)
    receivers = [NarReceiver("0" * 52, "none", None, budget) for _ in range(2)]
    receivers[0].receive(bytes(60))
    with pytest.raises(ServiceLimitError):
        receivers[1].receive(bytes(60))
    receivers[0].abort()
    receivers[1].receive(bytes(60))
    receivers[1].abort()
    budget.take(100)
