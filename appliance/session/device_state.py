"""The state of a session as a front-end saves it, and brings it back here or to another host.

It says what INIT negotiated, and which store paths the session was granted under which nodeids.
That is all: the nodeid of everything below a path is arithmetic over content, so it denotes the
same file on each host that has the path. The state has no content, and depends neither on the
release nor on the store.

    0     magic     8 bytes
    8     version   u32, little-endian
    12    checksum  u32: CRC-32 of the message
    16    length    u64: of the message in bytes
    24    message   a DeviceState (protos/device_state.proto)

Spec: vhost-user: Migrating back-end state.
"""

import struct
from collections.abc import Iterator
from typing import Final
from zlib import crc32

from google.protobuf.message import DecodeError

from appliance.castore.digest import Digest
from appliance.castore.directory import Node
from appliance.errors import VhostError
from appliance.fuse_proto.init import MINOR, OLDEST_MINOR, WANTED_FLAGS
from appliance.images.layout import Kind
from appliance.protos import device_state_pb2 as pb
from appliance.session.grants import Grants
from appliance.session.grants_layout import Grant, content_of
from appliance.session.session_memory import SessionMemory

MAGIC: Final = b"applianc"
VERSION: Final = 1
STATE_MAX: Final = 64 << 20
"""The largest state in bytes, which is that of some 500,000 store paths."""

_HEADER: Final = struct.Struct("<8sIIQ")
# Bytes of grants in one part; with what else a part has, it must fit a packet.
_PART_BYTES: Final = 3500


def save(memory: SessionMemory, grants: Grants) -> bytes:
    """Return the state of a session whose rings are stopped.

    Raises:
        VhostError: it would have more than `STATE_MAX` bytes.
    """
    state = pb.DeviceState(
        generation=grants.generation,
        is_by_content=grants.is_by_content,
        next_base=grants.next_base,
        grants=[_saved(grant, is_revoked=is_revoked) for grant, is_revoked in grants.rows()],
    )
    if memory.is_initialised:
        state.init.minor = memory.minor
        state.init.flags = memory.flags
        state.init.max_readahead = memory.max_readahead
    message = state.SerializeToString()
    if len(message) > STATE_MAX - _HEADER.size:
        raise VhostError(
            f"the device state of a session with {len(grants)} store paths has {len(message)} "
            f"bytes, more than {STATE_MAX}"
        )
    return _HEADER.pack(MAGIC, VERSION, crc32(message), len(message)) + message


def is_whole(data: bytes | bytearray) -> bool:
    """Return whether `data` is at least as long as its header says."""
    return len(data) >= _HEADER.size and len(data) - _HEADER.size >= _HEADER.unpack_from(data)[3]


def parse_untrusted(data: bytes | bytearray) -> pb.DeviceState:
    """Return the state in `data`; whether its grants make sense is for the supervisor to say.

    Raises:
        VhostError: it is none, is damaged, or a newer release has written it for a guest that this
            one cannot serve. The text says which.
    """
    if len(data) < _HEADER.size:
        raise VhostError(f"the device state has {len(data)} bytes, its header alone {_HEADER.size}")
    magic, version, checksum, length = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise VhostError(
            f"the device state is not one of this program: it begins with {magic!r}, expected "
            f"{MAGIC!r}"
        )
    if version != VERSION:
        raise VhostError(
            f"the device state has version {version}; this release reads version {VERSION}"
        )
    message = data[_HEADER.size :]
    if len(message) != length:
        raise VhostError(
            f"the device state has {len(message)} bytes after its header, expected {length}"
        )
    if crc32(message) != checksum:
        raise VhostError("the device state is damaged: its checksum is wrong")
    try:
        state = pb.DeviceState.FromString(bytes(message))
    except DecodeError as exc:
        raise VhostError("the device state is damaged: it is no DeviceState") from exc
    if state.HasField("init"):
        _check_init_untrusted(state.init)
    for saved in state.grants:
        # With whatever a newer release may have added to it.
        if saved.ByteSize() > _PART_BYTES:
            raise VhostError(
                f"the device state has a grant of {saved.ByteSize()} bytes, expected at most "
                f"{_PART_BYTES}"
            )
    return state


def parts(state: pb.DeviceState) -> Iterator[pb.DeviceState]:
    """Yield the state in parts that each fit a packet of the uplink; only the first is complete."""
    part = pb.DeviceState(
        generation=state.generation, is_by_content=state.is_by_content, next_base=state.next_base
    )
    num_bytes = 0
    for saved in state.grants:
        size = saved.ByteSize()
        if num_bytes and num_bytes + size > _PART_BYTES:
            yield part
            part, num_bytes = pb.DeviceState(), 0
        part.grants.append(saved)
        num_bytes += size
    yield part


def is_of(saved: pb.SavedGrant, node: Node) -> bool:
    """Return whether `node` has the content of a grant that was saved."""
    kind, digest, size, target = content_of(node)
    return (saved.kind, saved.size, saved.digest) == (kind, size, _digest(kind, digest, target))


def _saved(grant: Grant, *, is_revoked: bool) -> pb.SavedGrant:
    if is_revoked:
        return pb.SavedGrant(base=grant.base, span=grant.span)
    return pb.SavedGrant(
        base=grant.base,
        span=grant.span,
        name=grant.name,
        kind=grant.kind,
        size=grant.size,
        digest=_digest(grant.kind, grant.digest, grant.target),
    )


def _digest(kind: Kind, digest: bytes, target: bytes) -> bytes:
    return Digest.of(target) if kind == Kind.SYMLINK else digest


def _check_init_untrusted(init: pb.Init) -> None:
    if not OLDEST_MINOR <= init.minor <= MINOR:
        raise VhostError(
            f"the guest in the device state speaks FUSE 7.{init.minor}; this release speaks "
            f"7.{OLDEST_MINOR} to 7.{MINOR}"
        )
    if unknown := init.flags & ~int(WANTED_FLAGS):
        raise VhostError(
            f"the guest in the device state was promised FUSE flags 0x{unknown:x}, which this "
            "release does not have"
        )
