"""Random and damaged messages and streams: each is answered, and the daemon stays as it was."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from appliance.castore.digest import EMPTY_DIGEST
from appliance.castore.directory import Directory, SymlinkNode, node_to_message
from appliance.nix.path_info import encode_nar_addressed
from appliance.nix.store_path import nar_path
from appliance.protos import castore_rpc_pb2, pathinfo_rpc_pb2
from tests.contracts.rig import fresh_leaf, parent_of
from tests.fakes.daemon_process import DaemonProcess
from tests.rpc.wire import FAMILIES, Answer, connected

pytestmark = pytest.mark.slow

NUM_EXAMPLES = 300
GROWTH_MAX_BYTES = 16 << 20

# INTERNAL is for what cannot be helped, UNKNOWN for bugs: neither may be had by asking.
PROPER = frozenset(
    {
        grpc.StatusCode.OK,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class Case(NamedTuple):
    method: str
    messages: Sequence[bytes]


def _valid_streams() -> dict[str, list[list[bytes]]]:
    leaf = fresh_leaf()
    closure = [leaf, parent_of(leaf), parent_of(leaf, parent_of(leaf))]
    digest = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST).SerializeToString()
    node = SymlinkNode(b"", b"/target")
    path_info = encode_nar_addressed(
        nar_path(bytes(32), "fuzz"), node, nar_size=1, nar_sha256=bytes(32)
    )
    chunks = [castore_rpc_pb2.BlobChunk(data=b"x" * size) for size in (0, 5, 200, 70_000)]
    get = castore_rpc_pb2.GetDirectoryRequest(digest=leaf.digest(), recursive=True)
    by_hash = pathinfo_rpc_pb2.GetPathInfoRequest(by_output_hash=bytes(20))
    return {
        "BlobService/Stat": [[digest]],
        "BlobService/Read": [[digest]],
        "BlobService/Put": [[chunk.SerializeToString() for chunk in chunks]],
        "DirectoryService/Get": [[get.SerializeToString()], [digest]],
        "DirectoryService/Put": [
            [directory.to_bytes() for directory in closure],
            [Directory().to_bytes()],
        ],
        "PathInfoService/Get": [[by_hash.SerializeToString()]],
        "PathInfoService/Put": [[path_info]],
        "PathInfoService/CalculateNAR": [[node_to_message(node).SerializeToString()]],
        "PathInfoService/List": [[b""]],
    }


VALID = _valid_streams()


@st.composite
def damaged(draw: st.DrawFn, message: bytes) -> bytes:
    """Return `message` with some bytes changed, cut out, or put in."""
    data = bytearray(message)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        width = draw(st.integers(0, 4))
        data[at : at + width] = draw(st.binary(max_size=6))
    return bytes(data)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Return a call: a valid one damaged, or nonsense."""
    name = draw(st.sampled_from(sorted(VALID)))
    castore, store = draw(st.sampled_from(FAMILIES))
    method = f"{store if name.startswith('PathInfo') else castore}.{name}"
    messages = [
        draw(st.one_of(damaged(message), st.binary(max_size=80)))
        for message in draw(st.sampled_from(VALID[name]))
    ]
    order = draw(st.permutations(range(len(messages))))
    kept = order[: draw(st.integers(0, len(order)))]
    if not name.endswith("/Put") or name.startswith("PathInfo"):
        kept = order
    return Case(method, [messages[index] for index in kept])


@pytest.fixture(scope="module")
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    directory = tmp_path_factory.mktemp("fuzzed")
    with DaemonProcess(f"lmdb://{directory}/store", directory) as process:
        yield process


async def _answers(target: str, many: Sequence[Case]) -> list[Answer]:
    async with connected(target) as wire:
        return await asyncio.gather(*(wire.send(case.method, case.messages) for case in many))


def test_every_call_gets_a_proper_status(own_daemon: DaemonProcess) -> None:
    target = f"unix:{own_daemon.socket}"

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
    )
    @given(st.lists(cases(), min_size=1, max_size=5))
    def check(many: list[Case]) -> None:
        for case, answer in zip(many, asyncio.run(_answers(target, many)), strict=True):
            assert answer.code in PROPER, (case, answer)
            assert "Traceback" not in answer.text

    check()

    assert own_daemon.process.poll() is None
    assert "Traceback" not in own_daemon.log()


def test_memory_returns_to_where_it_was(own_daemon: DaemonProcess) -> None:
    target = f"unix:{own_daemon.socket}"
    rounds = [_nonsense() for _ in range(8)]
    asyncio.run(_answers(target, rounds[0]))
    before = own_daemon.memory_bytes("RssAnon")

    growths = []
    for many in rounds:
        for answer in asyncio.run(_answers(target, many)):
            assert answer.code in PROPER
        growths.append(own_daemon.memory_bytes("RssAnon") - before)

    # What the allocator holds goes up and down; what is kept for ever only up, by 32 MiB a round.
    assert min(growths[-4:]) < GROWTH_MAX_BYTES


def _nonsense() -> list[Case]:
    # Large messages, so that what is kept of them would show.
    return [
        Case(method, [os.urandom(1 << 20) for _ in range(4)])
        for method in (
            "tvix.castore.v1.BlobService/Put",
            "tvix.castore.v1.DirectoryService/Put",
        )
        for _ in range(4)
    ]
