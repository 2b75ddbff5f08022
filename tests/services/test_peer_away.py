"""Clients of a peer that is away for a moment, breaks off, or says nothing."""

import asyncio
import contextlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import grpc
import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory
from appliance.errors import ServiceUnavailableError
from appliance.protos import castore_rpc_pb2 as pb
from appliance.rpc.calls import Context
from appliance.services.addresses import GrpcAddress, unix_target
from appliance.services.grpc_blobs import GrpcBlobService
from appliance.services.grpc_client import Peer
from appliance.services.grpc_directories import GrpcDirectoryService
from appliance.services.grpc_messages import encode_chunk
from appliance.services.retry import persevere
from tests.contracts.rig import closure, fresh_leaf, parent_of, read_blob

if TYPE_CHECKING:
    from appliance.rpc.calls import Handler

Outcome: TypeAlias = "grpc.StatusCode | None"

DEADLINE_S = 30
BUDGET_S = 0.5
PIECE = 1000
GONE = grpc.StatusCode.UNAVAILABLE
ENDED = grpc.StatusCode.CANCELLED
RESET = grpc.StatusCode.INTERNAL


class Flaky:
    """A peer whose calls end early: with the statuses in `outcomes`, one after the other.

    Each stream sends `before` messages first. Calls after those in `outcomes` end well.
    """

    def __init__(self, path: Path, *outcomes: Outcome, before: int = 0) -> None:
        self.target = unix_target(path / "flaky.sock")
        self.content = b""
        self.members: list[Directory] = []
        self.num_calls = 0
        self._outcomes = list(outcomes)
        self._before = before
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, dict[str, Handler]] = {
            "BlobService": {"Stat": unary(self._stat), "Read": stream(self._read)},
            "DirectoryService": {"Get": stream(self._get)},
        }
        self._server = grpc.aio.server()
        for name, methods in handlers.items():
            service = f"tvix.castore.v1.{name}"
            handler = grpc.method_handlers_generic_handler(service, methods)
            self._server.add_generic_rpc_handlers([handler])
        self._server.add_insecure_port(self.target)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(0)

    async def _stat(self, _request: bytes, _context: Context) -> bytes:
        return pb.StatBlobResponse().SerializeToString()

    async def _read(self, _request: bytes, context: Context) -> AsyncIterator[bytes]:
        pieces = [self.content[at : at + PIECE] for at in range(0, len(self.content), PIECE)]
        async for message in self._answer([encode_chunk(piece) for piece in pieces], context):
            yield message

    async def _get(self, _request: bytes, context: Context) -> AsyncIterator[bytes]:
        async for message in self._answer([one.to_bytes() for one in self.members], context):
            yield message

    async def _answer(self, messages: list[bytes], context: Context) -> AsyncIterator[bytes]:
        self.num_calls += 1
        outcome = self._outcomes.pop(0) if self._outcomes else None
        for message in messages if outcome is None else messages[: self._before]:
            yield message
        if outcome is not None:
            text = "Received RST_STREAM with error code 2" if outcome is RESET else "away"
            await context.abort(outcome, text)


def run(
    flaky: Flaky,
    work: Callable[[Peer], Awaitable[None]],
    *,
    is_patient: bool = False,
    budget_s: float = DEADLINE_S,
) -> None:
    async def main() -> None:
        async with asyncio.timeout(DEADLINE_S):
            address = GrpcAddress(flaky.target, is_tls=False)
            peer = Peer(address, is_patient=is_patient, budget_s=budget_s)
            try:
                await work(peer)
            finally:
                await peer.close()
                await flaky.stop()

    asyncio.run(main())


def test_a_blob_comes_whole_however_often_its_stream_breaks(tmp_path: Path) -> None:
    flaky = Flaky(tmp_path, GONE, ENDED, RESET, before=3)
    flaky.content = os.urandom(10 * PIECE + 1)

    async def work(peer: Peer) -> None:
        await flaky.start()
        content = await read_blob(GrpcBlobService(peer), Digest.of(flaky.content))
        assert content == flaky.content

    run(flaky, work)
    assert flaky.num_calls == 4


def test_a_closure_comes_whole_and_each_directory_once(tmp_path: Path) -> None:
    leaves = [fresh_leaf() for _ in range(5)]
    flaky = Flaky(tmp_path, GONE, RESET, before=3)
    flaky.members = [parent_of(*leaves), *leaves]

    async def work(peer: Peer) -> None:
        await flaky.start()
        root = flaky.members[0].digest()
        assert await closure(GrpcDirectoryService(peer), root) == flaky.members

    run(flaky, work)
    assert flaky.num_calls == 3


def test_a_server_that_has_never_answered_is_not_waited_for(tmp_path: Path) -> None:
    flaky = Flaky(tmp_path)

    async def work(peer: Peer) -> None:
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(ServiceUnavailableError, match=r"flaky\.sock"):
            await peer.connect()
        assert asyncio.get_running_loop().time() - began_s < DEADLINE_S / 2

    run(flaky, work)


def test_a_server_that_comes_late_is_waited_for_by_who_has_to(tmp_path: Path) -> None:
    leaf = fresh_leaf()
    flaky = Flaky(tmp_path)
    flaky.members = [leaf]

    async def work(peer: Peer) -> None:
        asking = asyncio.create_task(GrpcDirectoryService(peer).get(leaf.digest()))
        await asyncio.wait([asking], timeout=0.3)
        assert not asking.done()
        await flaky.start()
        assert await asking == leaf

    run(flaky, work, is_patient=True)


def test_a_server_that_stays_away_is_given_up_when_the_time_of_a_request_is_over(
    tmp_path: Path,
) -> None:
    leaf = fresh_leaf()
    flaky = Flaky(tmp_path, *[GONE] * 1000)

    async def work(peer: Peer) -> None:
        await flaky.start()
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(ServiceUnavailableError, match=r"flaky\.sock: away") as caught:
            await GrpcDirectoryService(peer).get(leaf.digest())
        assert caught.value.is_final
        assert asyncio.get_running_loop().time() - began_s < DEADLINE_S / 2

    run(flaky, work, budget_s=BUDGET_S)
    assert 2 <= flaky.num_calls < 20


def test_a_server_that_says_nothing_is_given_up_after_one_budget(tmp_path: Path) -> None:
    leaf = fresh_leaf()

    async def work(peer: Peer) -> None:
        await flaky.start()
        with pytest.raises(ServiceUnavailableError, match=r"no answer within 0\.\d+ s"):
            await GrpcDirectoryService(peer).get(leaf.digest())

    class Silent(Flaky):
        async def _get(self, _request: bytes, _context: Context) -> AsyncIterator[bytes]:
            self.num_calls += 1
            await asyncio.Event().wait()
            yield b""

    flaky = Silent(tmp_path)
    run(flaky, work, budget_s=BUDGET_S)
    assert flaky.num_calls == 1


KNOWN_AWAY = r"flaky\.sock: does not answer, and is not waited for"


async def until_known_away(service: GrpcDirectoryService, digest: Digest) -> None:
    while True:
        with pytest.raises(ServiceUnavailableError) as caught:
            await service.get(digest)
        if re.search(KNOWN_AWAY, str(caught.value)):
            assert caught.value.is_final
            return


async def until_back(service: GrpcDirectoryService, digest: Digest) -> Directory | None:
    while True:
        with contextlib.suppress(ServiceUnavailableError):
            return await service.get(digest)
        await asyncio.sleep(0.01)


def test_a_server_that_is_known_to_be_away_is_waited_for_once_and_found_when_it_is_back(
    tmp_path: Path,
) -> None:
    leaf = fresh_leaf()
    flaky = Flaky(tmp_path)
    flaky.members = [leaf]

    async def work(peer: Peer) -> None:
        now_s = asyncio.get_running_loop().time
        service = GrpcDirectoryService(peer)
        for _ in range(2):
            await flaky.start()
            assert await until_back(service, leaf.digest()) == leaf
            await flaky.stop()
            await until_known_away(service, leaf.digest())
            began_s = now_s()
            for _ in range(20):
                with pytest.raises(ServiceUnavailableError, match=KNOWN_AWAY):
                    await service.get(leaf.digest())
            assert now_s() - began_s < 20 * BUDGET_S / 4

    run(flaky, work, budget_s=BUDGET_S)


def test_a_request_that_began_before_waits_to_its_end(tmp_path: Path) -> None:
    leaf = fresh_leaf()
    flaky = Flaky(tmp_path)
    flaky.members = [leaf]

    async def work(peer: Peer) -> None:
        await flaky.start()
        service = GrpcDirectoryService(peer)
        assert await service.get(leaf.digest()) == leaf
        await flaky.stop()
        # As a request of more patience than others.
        patience = await peer.patience()
        patience.budget_s = DEADLINE_S
        patience.restart()
        early = asyncio.create_task(persevere(lambda: once(peer, leaf.digest()), patience))
        await until_known_away(service, leaf.digest())
        assert not early.done()
        await flaky.start()
        assert await early

    run(flaky, work, budget_s=BUDGET_S)


async def once(peer: Peer, digest: Digest) -> bytes | None:
    """Ask once for a directory."""
    request = pb.GetDirectoryRequest(digest=digest).SerializeToString()
    with peer.translating():
        return await peer.next_message(peer.stream("tvix.castore.v1.DirectoryService/Get", request))


def test_one_answer_that_does_not_come_says_nothing_about_others(tmp_path: Path) -> None:
    leaf, slow = fresh_leaf(), fresh_leaf()

    class Slow(Flaky):
        async def _get(self, request: bytes, context: Context) -> AsyncIterator[bytes]:
            if pb.GetDirectoryRequest.FromString(request).digest == slow.digest():
                await asyncio.Event().wait()
            async for message in super()._get(request, context):
                yield message

    flaky = Slow(tmp_path)
    flaky.members = [leaf]

    async def work(peer: Peer) -> None:
        await flaky.start()
        service = GrpcDirectoryService(peer)
        for _ in range(2):
            with pytest.raises(ServiceUnavailableError, match=r"no answer within 0\.\d+ s"):
                await service.get(slow.digest())
            for _ in range(50):
                assert await service.get(leaf.digest()) == leaf

    run(flaky, work, budget_s=BUDGET_S)
