"""What a request can wait for: the node index does not have it yet, the resolver can add it."""

from typing import NamedTuple


class DirectoryWanted(NamedTuple):
    """The image of the directory with this content number."""

    number: int


class RootNameWanted(NamedTuple):
    """The entry of this name in the root, as a base name that may or may not be a store path."""

    name: bytes


class RootListWanted(NamedTuple):
    """A listing of the root no older than the store."""


class BackingWanted(NamedTuple):
    """The backing file for one open of content `number`: the request `unique`."""

    number: int
    unique: int


class BlobWanted(NamedTuple):
    """A blob that the cache lacks, of which a directory says that it has `size` bytes."""

    digest: bytes
    size: int


Want = DirectoryWanted | RootNameWanted | RootListWanted | BackingWanted | BlobWanted
