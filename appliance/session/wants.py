"""Wants: what a request may have to wait for because only the supervisor can provide it."""

from typing import NamedTuple

from appliance.protos import control_pb2 as pb


class DirectoryWanted(NamedTuple):
    """The image of the Directory with the digest `digest` (32 bytes)."""

    digest: bytes


class RootNameWanted(NamedTuple):
    """A grant of `name` in the root, a base name that may or may not be that of a store path."""

    name: bytes


class RootListWanted(NamedTuple):
    """Grants of all store paths that exist now."""


class BlobWanted(NamedTuple):
    """A range of a blob that the cache lacks.

    Attributes:
        digest: digest of the blob.
        size: size of the whole blob in bytes, as its directory states it.
        offset: where the range begins.
        length: size of the range in bytes; 0 for the whole blob.
    """

    digest: bytes
    size: int
    offset: int = 0
    length: int = 0


class BackingWanted(NamedTuple):
    """The backing file, with the content of a blob, for the OPEN request `unique` of `nodeid`."""

    nodeid: int
    unique: int
    digest: bytes
    size: int


Want = DirectoryWanted | RootNameWanted | RootListWanted | BlobWanted | BackingWanted


def pack_want(want: Want) -> pb.Resolve:
    """Return the message that asks for `want`."""
    match want:
        case DirectoryWanted(digest):
            return pb.Resolve(directory=digest)
        case RootNameWanted(name):
            return pb.Resolve(root_name=name)
        case RootListWanted():
            return pb.Resolve(root_list=True)
        case BlobWanted(digest, size, offset, length):
            blob = pb.Blob(digest=digest, size=size, offset=offset, length=length)
            return pb.Resolve(blob=blob)
        case BackingWanted(nodeid, _unique, digest, size):
            blob = pb.Blob(digest=digest, size=size)
            return pb.Resolve(backing=pb.Backing(nodeid=nodeid, blob=blob))


def unpack_want(message: pb.Resolve) -> Want:
    """Return what `message` asks for; the `unique` of a `BackingWanted` is not sent and is 0."""
    match message.WhichOneof("want"):
        case "directory":
            return DirectoryWanted(message.directory)
        case "root_name":
            return RootNameWanted(message.root_name)
        case "blob":
            blob = message.blob
            return BlobWanted(blob.digest, blob.size, blob.offset, blob.length)
        case "backing":
            blob = message.backing.blob
            return BackingWanted(message.backing.nodeid, 0, blob.digest, blob.size)
        case _:
            return RootListWanted()
