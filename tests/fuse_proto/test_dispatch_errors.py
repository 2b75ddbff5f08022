import logging
from collections.abc import Callable
from errno import EIO, ENOENT

import pytest

from appliance.errors import CorruptBlobError
from appliance.fuse_proto._fuse_wire import Opcode
from appliance.fuse_proto.dispatch import COUNTERS, Dispatcher
from appliance.fuse_proto.operations import Body, NotReady, Operations, Request
from tests.fakes import fuse_client
from tests.fakes.fuse_client import PlainSession
from tests.fuse_proto.rig import ENTRY, HANDLED, OneFile, Rig, with_len


@pytest.fixture
def rig() -> Rig:
    return Rig(OneFile())


class Raising(Operations):
    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def lookup(self, request: Request) -> Body:
        del request
        if self.error is not None:
            raise self.error
        return ENTRY


def without_errno() -> OSError:
    return OSError("no number")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: OSError(ENOENT, "gone"), ENOENT),
        (lambda: OSError(511, "the last"), 511),
        (lambda: OSError(512, "not for the wire"), EIO),
        (lambda: OSError(-5, "negative"), EIO),
        (lambda: OSError(0, "zero"), EIO),
        (without_errno, EIO),
        (lambda: FileNotFoundError(ENOENT, "gone"), ENOENT),
    ],
)
def test_oserror_becomes_its_errno(make: Callable[[], OSError], error: int) -> None:
    rig = Rig(Raising(make()))
    assert rig.answer(HANDLED["LOOKUP"]) == (99, error, b"")


def test_bug_is_eio_with_a_traceback_and_the_request(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(Raising(KeyError("oops")))
    with caplog.at_level(logging.DEBUG):
        assert rig.answer(HANDLED["LOOKUP"]).error == EIO
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert "LOOKUP unique=99 nodeid=1" in record.getMessage()
    assert "b'file'" in record.getMessage()
    assert rig.counted() == {Opcode.LOOKUP: 1}


def test_store_error_is_eio_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(Raising(CorruptBlobError("blob abc is not abc")))
    with caplog.at_level(logging.DEBUG):
        assert rig.answer(HANDLED["LOOKUP"]).error == EIO
    (record,) = caplog.records
    assert record.exc_info is None
    assert "blob abc" in record.getMessage()


def test_guests_mistakes_are_logged_for_debugging_only(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(OneFile())
    with caplog.at_level(logging.DEBUG):
        rig.answer(fuse_client.request(Opcode.LOOKUP, 1, b"no nul"))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG]
    assert "does not end with NUL" in caplog.text


def test_not_ready_passes_and_is_counted_when_it_runs_again() -> None:
    operations = Raising(NotReady("a directory"))
    rig = Rig(operations)
    with pytest.raises(NotReady) as caught:
        rig.handle(HANDLED["LOOKUP"])
    assert caught.value.want == "a directory"
    assert rig.counted() == {}
    operations.error = None
    assert rig.answer(HANDLED["LOOKUP"]).body == ENTRY
    assert rig.counted() == {Opcode.LOOKUP: 1}


def test_each_decided_request_is_counted_once_by_opcode(rig: Rig) -> None:
    rig.handle(HANDLED["LOOKUP"])
    rig.handle(fuse_client.lookup(1, b"a/b"))
    rig.handle(with_len(HANDLED["READ"], 3))
    rig.handle(fuse_client.mkdir(1, b"x"))
    rig.handle(fuse_client.forget(1))
    rig.handle(b"")
    assert rig.counted() == {
        0: 1,
        Opcode.LOOKUP: 2,
        Opcode.READ: 1,
        Opcode.MKDIR: 1,
        Opcode.FORGET: 1,
    }


def test_counters_of_another_shape_are_refused() -> None:
    for wrong in (memoryview(bytearray(COUNTERS)), memoryview(bytearray(512 * 2)).cast("Q")):
        with pytest.raises(ValueError, match="64 slots"):
            Dispatcher(Operations(), PlainSession(), wrong)
