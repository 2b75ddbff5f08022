"""Names of services on the wire, and the limits that both ends keep.

Requests and responses are handled as bytes: what a peer sent is kept as it is, and content is not
copied through messages.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from google.protobuf.message import DecodeError

from appliance.errors import InvalidRequestError
from appliance.protos import castore_rpc_pb2 as pb


class Family(NamedTuple):
    """One naming of the services; the messages are the same in all."""

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

# Of one message received. Others stop at 4 MiB, so content is sent in less; a directory of 50,000
# entries takes that much.
MESSAGE_MAX: Final = 16 << 20
CONTENT_MAX: Final = 1 << 20

CHANNEL_OPTIONS: Final[Sequence[tuple[str, int]]] = (
    ("grpc.max_receive_message_length", MESSAGE_MAX),
    ("grpc.max_send_message_length", MESSAGE_MAX),
)


# --- BlobChunk messages, without a copy more than needed ---
#
# castore_rpc.proto: BlobChunk.

Buffer = bytes | bytearray | memoryview

# Field 1, length-delimited.
_TAG: Final = 0x0A


def encode_chunk(data: Buffer) -> bytes:
    """Return the message that carries `data`."""
    if not data:
        return b""
    return b"".join((_prefix(len(data)), data))


def decode_chunk_untrusted(message: bytes) -> Buffer:
    """Return the data in a message.

    Raises:
        InvalidRequestError: it is not a BlobChunk.
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
    # The prefix, if all that follows it is data; its own size depends on the data's.
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
