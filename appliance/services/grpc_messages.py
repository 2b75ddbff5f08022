"""What both ends of a gRPC connection agree on: names of services, limits, BlobChunk messages.

Requests and responses are handled as bytes, so that what a peer sent is kept as it is. Messages
that carry content (castore_rpc.proto: BlobChunk) are encoded and decoded here, with one copy to
encode and, as a rule, none to decode.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from appliance.errors import InvalidRequestError
from appliance.protos import castore_rpc_pb2 as pb
from appliance.services.contracts import Buffer

# Bytes in one message received. A directory of 50,000 entries takes that much. Other servers stop
# at 4 MiB, so content is sent in pieces of less than that.
MESSAGE_MAX: Final = 16 << 20
CONTENT_MAX: Final = 1 << 20

CHANNEL_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    ("grpc.max_receive_message_length", MESSAGE_MAX),
    ("grpc.max_send_message_length", MESSAGE_MAX),
)

# The tag of field 1, length-delimited: the data of a BlobChunk.
_TAG: Final = 0x0A


# --- Names of services ---


class Family(NamedTuple):
    """The names under which Tvix or Snix know the services; the messages are the same.

    Args:
        castore: the protobuf package of blobs and directories.
        store: the protobuf package of PathInfos.
    """

    castore: str
    store: str

    def blobs(self) -> str:
        """Return the name of the blob service."""
        return f"{self.castore}.BlobService"

    def directories(self) -> str:
        """Return the name of the directory service."""
        return f"{self.castore}.DirectoryService"

    def path_infos(self) -> str:
        """Return the name of the PathInfo service."""
        return f"{self.store}.PathInfoService"


TVIX: Final = Family("tvix.castore.v1", "tvix.store.v1")
SNIX: Final = Family("snix.castore.v1", "snix.store.v1")
FAMILIES: Final = (TVIX, SNIX)
# Many objects in one message (bulk.proto), which only this project's daemon has.
BULK: Final = "appliance.castore.v1.BulkService"

# Metadata of a call to `PathInfoService.Put`: the PathInfo is to be refused (NOT_FOUND) if a path
# that it refers to is not there. Other servers than this project's daemon do not know it.
NEEDS_REFERENCES: Final = ("appliance-needs-references", "1")


# --- BlobChunk messages ---


def encode_chunk(data: Buffer) -> bytes:
    """Return the message that carries `data`."""
    if not data:
        return b""
    return b"".join((_prefix(len(data)), data))


def decode_chunk_untrusted(message: bytes) -> Buffer:
    """Return the data in a message, as a view of it if the message is encoded as usual.

    Raises:
        InvalidRequestError: the message is not a BlobChunk.
    """
    if not message:
        return b""
    prefix = _prefix_of_whole(message)
    if prefix is not None:
        return memoryview(message)[len(prefix) :]
    try:
        return pb.BlobChunk.FromString(message).data
    except DecodeError as exc:
        raise InvalidRequestError("not a BlobChunk message") from exc


def _prefix_of_whole(message: bytes) -> bytes | None:
    # The prefix (tag and length) if the rest of the message is the data. The size of the prefix
    # depends on that of the data, so each size is tried.
    for prefix_size in range(2, 7):
        if len(message) >= prefix_size:
            prefix = _prefix(len(message) - prefix_size)
            if len(prefix) == prefix_size and message.startswith(prefix):
                return prefix
    return None


def _prefix(size: int) -> bytes:
    varint = bytearray((_TAG,))
    while size > 0x7F:
        varint.append(size & 0x7F | 0x80)
        size >>= 7
    varint.append(size)
    return bytes(varint)
