"""Names of services on the wire, and the limits that both ends keep.

Requests and responses are handled as bytes: what a peer sent is kept as it is, and content is not
copied through messages.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple


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
