"""What a Directory refers to, read from its encoding without the checks of `castore.directory`.

For whoever walks a whole store: a Directory takes a fraction of the time here that `Directory`
takes, which makes an object of every entry.
"""

from google.protobuf.message import DecodeError

from appliance.protos import castore_pb2

_decode = castore_pb2.Directory.FromString


def digests_in(encoded: bytes) -> tuple[list[bytes], list[bytes]]:
    """Return the digests of the directories and of the blobs in a Directory, in its order.

    An encoding that is damaged so much that it cannot be decoded has none. A digest may occur more
    than once, and may have any length where the encoding breaks the rules.
    """
    try:
        message = _decode(encoded)
    except DecodeError:
        return [], []
    return [node.digest for node in message.directories], [node.digest for node in message.files]


def sized_contents_in(encoded: bytes) -> tuple[list[bytes], list[tuple[bytes, int]]]:
    """Return what `digests_in` does, with the size in bytes that each blob's node states."""
    try:
        message = _decode(encoded)
    except DecodeError:
        return [], []
    return (
        [node.digest for node in message.directories],
        [(node.digest, node.size) for node in message.files],
    )
