"""Requests that wait together are asked for once."""

from appliance.fuse_proto.operations import NotReady
from appliance.index.wants import DirectoryWanted, RootListWanted, Want
from appliance.worker.parking import Parking


def test_equal_wants_are_asked_for_once_and_come_back_in_order() -> None:
    asked: list[Want] = []
    parking: Parking[int] = Parking(asked.append)
    for request in (1, 2, 3):
        parking.park(NotReady(DirectoryWanted(7)), request)
    parking.park(NotReady(RootListWanted()), 4)
    assert asked == [DirectoryWanted(7), RootListWanted()]
    assert parking.wants() == asked
    assert parking.take(DirectoryWanted(7)) == [1, 2, 3]
    assert parking.take(DirectoryWanted(7)) == []
    assert bool(parking)
    assert parking.take(RootListWanted()) == [4]
    assert not parking


def test_what_was_taken_is_asked_for_again() -> None:
    asked: list[Want] = []
    parking: Parking[int] = Parking(asked.append)
    for _ in range(2):
        parking.park(NotReady(DirectoryWanted(7)), 1)
        parking.take(DirectoryWanted(7))
    assert len(asked) == 2
