"""BlobChunk messages, without a copy more than needed.

castore_rpc.proto: BlobChunk.
"""

from typing import Final

from google.protobuf.message import DecodeError

from appliance.errors import InvalidRequestError
from appliance.protos import castore_rpc_pb2 as pb

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
