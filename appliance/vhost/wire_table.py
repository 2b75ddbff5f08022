"""vhost-user on the wire: every structure, flag and request once.

A message is a header, then `size` payload bytes; descriptors travel with the header's first byte:

    request u32 | flags u32 | size u32 | payload

Integers are in host order; a reply carries the number of its request and flags of exactly 0x5.

Spec: vhost-user: Message Specification, Front-end message types, Protocol features.
"""

from enum import Enum as PyEnum
from typing import Final, Literal, NamedTuple

from appliance.wiregen import Enum, Flags, Struct

C_HEADER: Final = None  # the kernel ships none for vhost-user

# --- Structures ---

_HEADER: Final = Struct("Header", "VhostUserHeader", "request:I flags:I size:I")
_WORD: Final = Struct("Word", "u64", "value:Q")
_VRING_STATE: Final = Struct("VringState", "vhost_vring_state", "ring:I num:I")
_VRING_ADDR: Final = Struct(
    "VringAddr",
    "vhost_vring_addr",
    "ring:I flags:I desc:Q used:Q avail:Q log_guest_addr:Q",
)
_REGION: Final = Struct("Region", "VhostUserMemoryRegion", "gpa:Q size:Q user_addr:Q mmap_offset:Q")
_MEM_TABLE: Final = Struct("MemTable", "VhostUserMemory", "num_regions:I 4x")
_MEM_REG: Final = Struct("MemReg", "VhostUserMemRegMsg", "8x region:Region")
_CONFIG: Final = Struct("Config", "VhostUserConfig", "offset:I size:I flags:I")
_INFLIGHT: Final = Struct(
    "Inflight", "VhostUserInflight", "mmap_size:Q mmap_offset:Q num_queues:H queue_size:H 4x"
)
# VIRTIO 1.3, 5.11.4 (File System Device: configuration layout).
_FS_CONFIG: Final = Struct("FsConfig", "virtio_fs_config", "tag:36s num_request_queues:I")

STRUCTS: Final = (
    _HEADER,
    _WORD,
    _VRING_STATE,
    _VRING_ADDR,
    _REGION,
    _MEM_TABLE,
    _MEM_REG,
    _CONFIG,
    _INFLIGHT,
    _FS_CONFIG,
)

# --- Requests ---


class Tail(PyEnum):
    """What follows the fixed part of a payload."""

    NONE = "nothing"
    REGIONS = "num_regions x Region, and perhaps unused slots"
    CONFIG = "size bytes"


class Req(NamedTuple):
    """One front-end request, and when it is legal.

    A request with an own reply is answered by that, whether or not NEED_REPLY is set; every other
    one by a u64, 0 for success, if NEED_REPLY is set.
    """

    number: int
    name: str
    payload: Struct | None = None
    tail: Tail = Tail.NONE
    fds: tuple[int, int] = (0, 0)  # fewest and most
    needs: str | None = None  # member of ProtocolFeature
    reply: Struct | Literal["ack", "other"] = "ack"
    failure: bytes | None = None  # an own reply that tells failure; without one the connection ends
    refused: str | None = None  # why this device never serves it; its payload is skipped unread


# As many descriptors as one message may carry: regions of a SET_MEM_TABLE.
MAX_FDS: Final = 32

_NET: Final = "only for network devices"
_CRYPTO: Final = "only for crypto devices"
_POSTCOPY: Final = "post-copy migration is not offered"
_STATUS: Final = "device status is not offered"
_LOG: Final = "dirty page logging is not offered"
_STATE: Final = "device state transfer is not offered"

REQUESTS: Final = (
    Req(1, "GET_FEATURES", reply=_WORD),
    Req(2, "SET_FEATURES", _WORD),
    Req(3, "SET_OWNER"),
    Req(4, "RESET_OWNER"),
    Req(5, "SET_MEM_TABLE", _MEM_TABLE, Tail.REGIONS, fds=(0, MAX_FDS)),
    Req(6, "SET_LOG_BASE", refused=_LOG),
    Req(7, "SET_LOG_FD", refused=_LOG),
    Req(8, "SET_VRING_NUM", _VRING_STATE),
    Req(9, "SET_VRING_ADDR", _VRING_ADDR),
    Req(10, "SET_VRING_BASE", _VRING_STATE),
    Req(11, "GET_VRING_BASE", _VRING_STATE, reply=_VRING_STATE),
    Req(12, "SET_VRING_KICK", _WORD, fds=(0, 1)),
    Req(13, "SET_VRING_CALL", _WORD, fds=(0, 1)),
    Req(14, "SET_VRING_ERR", _WORD, fds=(0, 1)),
    Req(15, "GET_PROTOCOL_FEATURES", reply=_WORD),
    Req(16, "SET_PROTOCOL_FEATURES", _WORD),
    Req(17, "GET_QUEUE_NUM", needs="MQ", reply=_WORD),
    Req(18, "SET_VRING_ENABLE", _VRING_STATE),
    Req(19, "SEND_RARP", refused=_NET),
    Req(20, "NET_SET_MTU", refused=_NET),
    Req(21, "SET_BACKEND_REQ_FD", fds=(1, 1), needs="BACKEND_REQ"),
    Req(22, "IOTLB_MSG", reply=_WORD, refused="there is no IOMMU support"),
    Req(23, "SET_VRING_ENDIAN", refused="only for legacy devices"),
    Req(24, "GET_CONFIG", _CONFIG, Tail.CONFIG, needs="CONFIG", reply=_CONFIG, failure=b""),
    Req(25, "SET_CONFIG", _CONFIG, Tail.CONFIG, needs="CONFIG"),
    Req(26, "CREATE_CRYPTO_SESSION", reply=_WORD, refused=_CRYPTO),
    Req(27, "CLOSE_CRYPTO_SESSION", refused=_CRYPTO),
    Req(28, "POSTCOPY_ADVISE", reply="other", refused=_POSTCOPY),
    Req(29, "POSTCOPY_LISTEN", refused=_POSTCOPY),
    Req(30, "POSTCOPY_END", reply=_WORD, refused=_POSTCOPY),
    Req(
        31,
        "GET_INFLIGHT_FD",
        _INFLIGHT,
        needs="INFLIGHT_SHMFD",
        reply=_INFLIGHT,
        failure=bytes(24),  # an mmap_size of 0: there is no buffer
    ),
    Req(32, "SET_INFLIGHT_FD", _INFLIGHT, fds=(1, 1), needs="INFLIGHT_SHMFD"),
    Req(33, "GPU_SET_SOCKET", refused="only for GPU devices"),
    Req(34, "RESET_DEVICE", needs="RESET_DEVICE"),
    Req(35, "VRING_KICK", refused="in-band notifications are not offered"),
    Req(36, "GET_MAX_MEM_SLOTS", needs="CONFIGURE_MEM_SLOTS", reply=_WORD),
    Req(37, "ADD_MEM_REG", _MEM_REG, fds=(1, 1), needs="CONFIGURE_MEM_SLOTS"),
    # Some front-ends attach the region's descriptor here too.
    Req(38, "REM_MEM_REG", _MEM_REG, fds=(0, 1), needs="CONFIGURE_MEM_SLOTS"),
    Req(39, "SET_STATUS", refused=_STATUS),
    Req(40, "GET_STATUS", reply=_WORD, refused=_STATUS),
    Req(41, "GET_SHARED_OBJECT", reply="other", refused="there are no shared objects"),
    Req(42, "SET_DEVICE_STATE_FD", reply=_WORD, refused=_STATE),
    Req(43, "CHECK_DEVICE_STATE", reply=_WORD, refused=_STATE),
    Req(44, "GET_SHMEM_CONFIG", reply="other", refused="there is no shared memory region"),
    Req(45, "GET_VRING_BASE_SKIP_DRAIN", reply=_VRING_STATE, refused="rings are always drained"),
)

# --- Numbers ---

ENUMS: Final = (
    Enum("Request", {row.name: row.number for row in REQUESTS}),
    Flags("HeaderFlag", {"VERSION_1": 0x1, "REPLY": 0x4, "NEED_REPLY": 0x8}),
    # The vring of SET_VRING_KICK, _CALL and _ERR is in the low byte.
    Flags("VringFd", {"NONE": 0x100}),
    Flags(
        "VirtioFeature",
        {
            "LOG_ALL": 1 << 26,
            "INDIRECT_DESC": 1 << 28,
            "EVENT_IDX": 1 << 29,
            "PROTOCOL_FEATURES": 1 << 30,  # vhost-user's own; the guest never sees it
            "VERSION_1": 1 << 32,
        },
    ),
    Flags(
        "ProtocolFeature",
        {
            "MQ": 1 << 0,
            "LOG_SHMFD": 1 << 1,
            "RARP": 1 << 2,
            "REPLY_ACK": 1 << 3,
            "NET_MTU": 1 << 4,
            "BACKEND_REQ": 1 << 5,
            "CROSS_ENDIAN": 1 << 6,
            "CRYPTO_SESSION": 1 << 7,
            "PAGEFAULT": 1 << 8,
            "CONFIG": 1 << 9,
            "BACKEND_SEND_FD": 1 << 10,
            "HOST_NOTIFIER": 1 << 11,
            "INFLIGHT_SHMFD": 1 << 12,
            "RESET_DEVICE": 1 << 13,
            "INBAND_NOTIFICATIONS": 1 << 14,
            "CONFIGURE_MEM_SLOTS": 1 << 15,
            "STATUS": 1 << 16,
            "XEN_MMAP": 1 << 17,
            "SHARED_OBJECT": 1 << 18,
            "DEVICE_STATE": 1 << 19,
            "GET_VRING_BASE_INFLIGHT": 1 << 20,
            "GPA_ADDRESSES": 1 << 21,
            "SHMEM": 1 << 22,
            "GET_VRING_BASE_SKIP_DRAIN": 1 << 23,
        },
    ),
)
