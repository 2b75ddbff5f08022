"""The requests of a vhost-user front-end, and when each is legal.

Structures are named as in `_vhost_wire.CODECS`.

Spec: vhost-user: Front-end message types; Communication (which requests have replies and carry
descriptors); VHOST_USER_PROTOCOL_F_REPLY_ACK.
"""

from enum import Enum
from typing import Final, NamedTuple

from appliance.bounds import MESSAGE_FDS_MAX


class Tail(Enum):
    """What follows the structure at the start of a payload."""

    NONE = "nothing"
    REGIONS = "num_regions x Region, and possibly unused slots"
    CONFIG = "as many bytes as the structure's size says"


class RequestRow(NamedTuple):
    """One front-end request, and when it is legal.

    A request with a reply of its own gets that reply whether or not NEED_REPLY is set. Any other
    request gets a u64, 0 for success, if NEED_REPLY is set.
    """

    number: int
    name: str
    payload: str | None = None
    """The name of a structure; None if there is no payload."""
    tail: Tail = Tail.NONE
    fds: tuple[int, int] = (0, 0)
    """The smallest and the largest number of descriptors that may come with it."""
    needs: str | None = None
    """The member of ProtocolFeature that must have been negotiated, if any."""
    reply: str = "ack"
    """The name of the reply's structure, "ack", or "other": one that this device never sends."""
    failure: bytes | None = None
    """The payload of its own reply that reports failure. If None, a failure ends the connection."""
    refused: str | None = None
    """Why this device never serves it, if so. Its payload is then skipped unread."""


_NET: Final = "only for network devices"
_CRYPTO: Final = "only for crypto devices"
_POSTCOPY: Final = "post-copy migration is not offered"
_STATUS: Final = "device status is not offered"

REQUESTS: Final = (
    RequestRow(1, "GET_FEATURES", reply="Word"),
    RequestRow(2, "SET_FEATURES", "Word"),
    RequestRow(3, "SET_OWNER"),
    RequestRow(4, "RESET_OWNER"),
    RequestRow(5, "SET_MEM_TABLE", "MemTable", Tail.REGIONS, fds=(0, MESSAGE_FDS_MAX)),
    RequestRow(6, "SET_LOG_BASE", "Log", fds=(1, 1), needs="LOG_SHMFD", reply="Log"),
    RequestRow(7, "SET_LOG_FD", fds=(0, 1)),
    RequestRow(8, "SET_VRING_NUM", "VringState"),
    RequestRow(9, "SET_VRING_ADDR", "VringAddr"),
    RequestRow(10, "SET_VRING_BASE", "VringState"),
    RequestRow(11, "GET_VRING_BASE", "VringState", reply="VringState"),
    RequestRow(12, "SET_VRING_KICK", "Word", fds=(0, 1)),
    RequestRow(13, "SET_VRING_CALL", "Word", fds=(0, 1)),
    RequestRow(14, "SET_VRING_ERR", "Word", fds=(0, 1)),
    RequestRow(15, "GET_PROTOCOL_FEATURES", reply="Word"),
    RequestRow(16, "SET_PROTOCOL_FEATURES", "Word"),
    RequestRow(17, "GET_QUEUE_NUM", needs="MQ", reply="Word"),
    RequestRow(18, "SET_VRING_ENABLE", "VringState"),
    RequestRow(19, "SEND_RARP", refused=_NET),
    RequestRow(20, "NET_SET_MTU", refused=_NET),
    RequestRow(21, "SET_BACKEND_REQ_FD", fds=(1, 1), needs="BACKEND_REQ"),
    RequestRow(22, "IOTLB_MSG", reply="Word", refused="there is no IOMMU support"),
    RequestRow(23, "SET_VRING_ENDIAN", refused="only for legacy devices"),
    RequestRow(
        24, "GET_CONFIG", "Config", Tail.CONFIG, needs="CONFIG", reply="Config", failure=b""
    ),
    RequestRow(25, "SET_CONFIG", "Config", Tail.CONFIG, needs="CONFIG"),
    RequestRow(26, "CREATE_CRYPTO_SESSION", reply="Word", refused=_CRYPTO),
    RequestRow(27, "CLOSE_CRYPTO_SESSION", refused=_CRYPTO),
    RequestRow(28, "POSTCOPY_ADVISE", reply="other", refused=_POSTCOPY),
    RequestRow(29, "POSTCOPY_LISTEN", refused=_POSTCOPY),
    RequestRow(30, "POSTCOPY_END", reply="Word", refused=_POSTCOPY),
    RequestRow(
        31,
        "GET_INFLIGHT_FD",
        "Inflight",
        needs="INFLIGHT_SHMFD",
        reply="Inflight",
        failure=bytes(24),  # with an mmap_size of 0: there is no buffer
    ),
    RequestRow(32, "SET_INFLIGHT_FD", "Inflight", fds=(1, 1), needs="INFLIGHT_SHMFD"),
    RequestRow(33, "GPU_SET_SOCKET", refused="only for GPU devices"),
    RequestRow(34, "RESET_DEVICE", needs="RESET_DEVICE"),
    RequestRow(35, "VRING_KICK", refused="in-band notifications are not offered"),
    RequestRow(36, "GET_MAX_MEM_SLOTS", needs="CONFIGURE_MEM_SLOTS", reply="Word"),
    RequestRow(37, "ADD_MEM_REG", "MemReg", fds=(1, 1), needs="CONFIGURE_MEM_SLOTS"),
    # Some front-ends send the region's descriptor here, too.
    RequestRow(38, "REM_MEM_REG", "MemReg", fds=(0, 1), needs="CONFIGURE_MEM_SLOTS"),
    RequestRow(39, "SET_STATUS", refused=_STATUS),
    RequestRow(40, "GET_STATUS", reply="Word", refused=_STATUS),
    RequestRow(41, "GET_SHARED_OBJECT", reply="other", refused="there are no shared objects"),
    RequestRow(
        42,
        "SET_DEVICE_STATE_FD",
        "StateTransfer",
        fds=(1, 1),
        needs="DEVICE_STATE",
        reply="Word",
        failure=(0x101).to_bytes(8, "little"),  # an error, and no descriptor
    ),
    RequestRow(
        43,
        "CHECK_DEVICE_STATE",
        needs="DEVICE_STATE",
        reply="Word",
        failure=(1).to_bytes(8, "little"),
    ),
    RequestRow(44, "GET_SHMEM_CONFIG", reply="other", refused="there is no shared memory region"),
    RequestRow(
        45, "GET_VRING_BASE_SKIP_DRAIN", reply="VringState", refused="rings are always drained"
    ),
)
