"""The state of a session: what is saved is found again, in parts that fit a packet."""

import random
import struct
import zlib
from collections.abc import Iterator

import pytest

from appliance.bounds import UPLINK_MESSAGE_MAX
from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import VhostError
from appliance.fuse_proto.init import WANTED_FLAGS
from appliance.session import device_state
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.session_memory import SessionMemory

DIGEST = Digest.of(b"x")


@pytest.fixture
def memory() -> Iterator[SessionMemory]:
    made = SessionMemory.create(2)
    yield made
    made.close()


@pytest.fixture
def table() -> Iterator[GrantTable]:
    made = GrantTable()
    yield made
    made.close()


def node(number: int) -> Node:
    name = b"%032d-node" % number
    return (
        DirectoryNode(name, DIGEST, number),
        FileNode(name, DIGEST, number, executable=False),
        FileNode(name, DIGEST, number, executable=True),
        SymlinkNode(name, b"to %d" % number),
    )[number % 4]


def test_what_is_saved_is_what_the_session_is(memory: SessionMemory, table: GrantTable) -> None:
    rng = random.Random(5)
    nodes = {number: node(number) for number in range(40)}
    for one in nodes.values():
        table.grant(one)
    revoked = sorted(rng.sample(range(40), 5))
    for number in revoked:
        table.revoke(nodes[number].name)
    memory.start(31, int(WANTED_FLAGS), 4096)
    reader = Grants(table.fd)

    state = device_state.parse_untrusted(device_state.save(memory, reader))

    assert (state.init.minor, state.init.flags) == (31, WANTED_FLAGS)
    assert (memory.max_readahead, state.init.max_readahead) == (4096, 4096)
    assert (state.generation, state.next_base) == (reader.generation, reader.next_base)
    assert not state.is_by_content
    rows = [grant for grant, _is_revoked in reader.rows()]
    assert [(one.base, one.span) for one in state.grants] == [(one.base, one.span) for one in rows]
    for number, saved in enumerate(state.grants):
        if number in revoked:
            assert not saved.name
            continue
        assert saved.name == nodes[number].name
        assert device_state.is_of(saved, nodes[number])
        others = [other for key, other in nodes.items() if key != number]
        assert not any(device_state.is_of(saved, other) for other in others)


def test_without_init_none_is_saved(memory: SessionMemory, table: GrantTable) -> None:
    state = device_state.parse_untrusted(device_state.save(memory, Grants(table.fd)))
    assert not state.HasField("init")
    memory.start(31, 0, 0)
    memory.end()
    state = device_state.parse_untrusted(device_state.save(memory, Grants(table.fd)))
    assert not state.HasField("init")


def test_parts_are_the_whole_and_fit_a_packet(memory: SessionMemory, table: GrantTable) -> None:
    for number in range(500):
        table.grant(node(number))
    state = device_state.parse_untrusted(device_state.save(memory, Grants(table.fd)))
    parts = list(device_state.parts(state))
    assert len(parts) > 5
    assert [saved for part in parts for saved in part.grants] == list(state.grants)
    assert (parts[0].generation, parts[0].next_base) == (state.generation, state.next_base)
    # The envelope around it takes a few bytes more.
    assert max(part.ByteSize() for part in parts) < UPLINK_MESSAGE_MAX - 100


def test_a_state_is_whole_when_it_has_as_many_bytes_as_it_says(
    memory: SessionMemory, table: GrantTable
) -> None:
    table.grant(node(1))
    data = device_state.save(memory, Grants(table.fd))
    for size in range(len(data)):
        assert not device_state.is_whole(data[:size])
        with pytest.raises(VhostError, match="device state"):
            device_state.parse_untrusted(data[:size])
    assert device_state.is_whole(data)
    assert device_state.is_whole(data + b"more")


def test_a_byte_that_is_wrong_anywhere_is_noticed(memory: SessionMemory, table: GrantTable) -> None:
    table.grant(node(3))
    data = device_state.save(memory, Grants(table.fd))
    for at in range(len(data)):
        damaged = data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]
        with pytest.raises(VhostError, match="device state"):
            device_state.parse_untrusted(damaged)


def test_a_state_that_nobody_could_load_is_not_saved(
    memory: SessionMemory, table: GrantTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_state, "STATE_MAX", 100)
    device_state.save(memory, Grants(table.fd))
    for number in range(10):
        table.grant(node(number))
    with pytest.raises(VhostError, match="10 store paths"):
        device_state.save(memory, Grants(table.fd))


@pytest.mark.parametrize("kind", ["name", "digest", "of a newer release"])
def test_a_grant_that_fits_no_packet_is_refused(
    memory: SessionMemory, table: GrantTable, kind: str
) -> None:
    table.grant(node(3))
    state = device_state.parse_untrusted(device_state.save(memory, Grants(table.fd)))
    (saved,) = state.grants
    if kind == "name":
        saved.name = b"n" * UPLINK_MESSAGE_MAX
    elif kind == "digest":
        saved.digest = bytes(UPLINK_MESSAGE_MAX)
    else:
        field = b"\xc2\x3e\x80\x20" + bytes(UPLINK_MESSAGE_MAX)  # number 1000, 4096 bytes
        saved.MergeFromString(field)
    message = state.SerializeToString()
    header = struct.pack("<8sIIQ", device_state.MAGIC, 1, zlib.crc32(message), len(message))
    with pytest.raises(VhostError, match=r"has a grant of 4\d\d\d bytes, expected at most"):
        device_state.parse_untrusted(header + message)
