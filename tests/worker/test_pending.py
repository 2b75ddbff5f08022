"""Requests that wait together are asked for once."""

from appliance.fuse_proto.operations import NotReady
from appliance.session.wants import DirectoryWanted, RootListWanted, Want
from appliance.worker.pending import Parking

DIRECTORY = DirectoryWanted(bytes(32))


def test_equal_wants_are_asked_for_once_and_come_back_in_order() -> None:
    asked: list[Want] = []
    parking: Parking[int] = Parking(asked.append)
    for request in (1, 2, 3):
        parking.park(NotReady(DIRECTORY), request)
    parking.park(NotReady(RootListWanted()), 4)
    assert asked == [DIRECTORY, RootListWanted()]
    assert parking.wants() == asked
    assert parking.take(DIRECTORY) == [1, 2, 3]
    assert parking.take(DIRECTORY) == []
    assert bool(parking)
    assert parking.take(RootListWanted()) == [4]
    assert not parking


def test_what_was_taken_is_asked_for_again() -> None:
    asked: list[Want] = []
    parking: Parking[int] = Parking(asked.append)
    for _ in range(2):
        parking.park(NotReady(DIRECTORY), 1)
        parking.take(DIRECTORY)
    assert len(asked) == 2


def test_what_is_provided_again_and_again_and_missed_all_the_same_is_given_up() -> None:
    asked: list[Want] = []
    parking: Parking[int] = Parking(asked.append)
    parking.park(NotReady(DIRECTORY), 1)
    hopeless: list[int] = []
    while not hopeless:
        assert len(asked) < 100
        (request,) = parking.take(DIRECTORY)
        parking.park(NotReady(DIRECTORY), request)
        hopeless = parking.take_hopeless(DIRECTORY)
    assert hopeless == [1]
    assert not parking
    # From then on it has its chances again.
    parking.park(NotReady(DIRECTORY), 2)
    parking.take(DIRECTORY)
    parking.park(NotReady(DIRECTORY), 2)
    assert parking.take_hopeless(DIRECTORY) == []
