"""Many small blobs in one call: what is put is there, and what breaks a rule is refused."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc
import pytest
from blake3 import blake3

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.protos import small_blobs_pb2 as pb
from appliance.services.addresses import ServiceAddresses, parse_service_uri
from appliance.services.contracts import BlobService, TakesSmallBlobs
from appliance.services.grpc_small_blobs import DIGESTS_MAX, SERVICE
from appliance.services.open_services import open_services
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import run

pytestmark = pytest.mark.slow


def with_blobs(uri: str, work: Callable[[BlobService], Awaitable[None]]) -> None:
    async def connected() -> None:
        address = parse_service_uri(uri)
        async with open_services(ServiceAddresses(address, address, address)) as services:
            await work(services.blobs)

    asyncio.run(connected())


async def check_put(blobs: BlobService) -> None:
    """Put blobs of many sizes, more than one message and one question take."""
    assert isinstance(blobs, TakesSmallBlobs)
    sizes = (0, 1, 4095, 65_536, *([200] * (DIGESTS_MAX + 1)), *([60_000] * 20))
    contents = {Digest.of(content): content for content in map(os.urandom, sizes)}
    first = dict(list(contents.items())[:10])
    assert await blobs.missing(list(first)) == [one for one in first if one != EMPTY_DIGEST]
    assert await blobs.put_small(first)
    assert await blobs.missing(list(first)) == []
    assert await blobs.put_small(contents)
    assert await blobs.missing(list(contents)) == []
    for digest in list(contents)[:20]:
        reader = await blobs.open_read(digest)
        assert reader is not None
        assert await reader.read(1 << 20) == contents[digest]
        await reader.close()


def test_blobs_are_put_into_a_store(tmp_path: Path) -> None:
    with_blobs(f"lmdb://{tmp_path}/store", check_put)


def test_blobs_are_put_through_a_daemon(daemon: DaemonProcess) -> None:
    with_blobs(daemon.unix_uri, check_put)


def test_blobs_are_put_through_two_daemons(daemon: DaemonProcess, tmp_path: Path) -> None:
    with DaemonProcess(daemon.unix_uri, tmp_path) as front:
        with_blobs(front.unix_uri, check_put)


def test_services_without_it_say_so(tmp_path: Path) -> None:
    async def check_refused(blobs: BlobService) -> None:
        assert isinstance(blobs, TakesSmallBlobs)
        for _ in range(2):
            assert await blobs.missing([EMPTY_DIGEST]) is None
            assert not await blobs.put_small({EMPTY_DIGEST: b""})

    with DaemonProcess("memory:", tmp_path / "back") as back:
        with_blobs(back.unix_uri, check_refused)
        with DaemonProcess(back.unix_uri, tmp_path / "front") as front:
            with_blobs(front.unix_uri, check_refused)


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"garbage", "not a BlobDigests message"),
        (pb.BlobDigests(digests=[bytes(31)]).SerializeToString(), "invalid digest length"),
        (
            pb.BlobDigests(digests=[bytes(32)] * (DIGESTS_MAX + 1)).SerializeToString(),
            f"{DIGESTS_MAX + 1} digests in one request, the limit is {DIGESTS_MAX}",
        ),
    ],
    ids=["garbage", "short", "many"],
)
def test_questions_that_are_refused(target: str, request_: bytes, reason: str) -> None:
    answer = run(target, lambda wire: wire.ask(f"{SERVICE}/Missing", request_))
    assert answer.code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason in answer.text


def test_blobs_that_are_refused(target: str) -> None:
    large = pb.BlobContents(contents=[bytes(65_537)]).SerializeToString()
    for sent, reason in (([large], "has 65537 bytes"), ([b"\xff"], "not a BlobContents message")):
        answer = run(target, lambda wire: wire.send(f"{SERVICE}/Put", sent))  # noqa: B023 - at once
        assert answer.code == grpc.StatusCode.INVALID_ARGUMENT
        assert reason in answer.text


def test_the_answer_names_all_of_them(target: str) -> None:
    contents = [os.urandom(100) for _ in range(3)]
    messages = [
        pb.BlobContents(contents=contents[:2]).SerializeToString(),
        pb.BlobContents(contents=contents[2:]).SerializeToString(),
    ]
    answer = run(target, lambda wire: wire.send(f"{SERVICE}/Put", messages))
    assert answer.code == grpc.StatusCode.OK
    kept = pb.KeptBlobs.FromString(answer.messages[0]).digest
    assert kept == blake3(b"".join(map(Digest.of, contents))).digest()


def test_a_read_only_daemon_says_what_is_missing_and_takes_nothing(tmp_path: Path) -> None:
    DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "first").stop()
    options = ["--read-only"]
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "second", options=options) as daemon:
        message = pb.BlobContents(contents=[b"x"]).SerializeToString()
        unix = f"unix:{daemon.socket}"
        answer = run(unix, lambda wire: wire.send(f"{SERVICE}/Put", [message]))
        assert answer.code == grpc.StatusCode.FAILED_PRECONDITION
        request = pb.BlobDigests(digests=[Digest.of(b"x")]).SerializeToString()
        answer = run(unix, lambda wire: wire.ask(f"{SERVICE}/Missing", request))
        assert answer.code == grpc.StatusCode.OK
