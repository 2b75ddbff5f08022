"""The structures and numbers of the vhost-user wire format.

A message is a header, then `size` bytes of payload. Descriptors are sent with the first byte of the
header:

    request u32 | flags u32 | size u32 | payload

Integers are in host order. A reply has the number of its request, and its flags are exactly 0x5.

Spec: vhost-user: Message Specification, Front-end message types, Protocol features.
"""

from typing import Final

from appliance.vhost.requests import REQUESTS
from tools.wiregen import Enum, Flags, Struct

OUTPUT: Final = "appliance/vhost/_vhost_wire.py"
C_HEADER: Final = None  # the kernel has no header for vhost-user

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
_LOG: Final = Struct("Log", "VhostUserLog", "mmap_size:Q mmap_offset:Q")
_STATE_TRANSFER: Final = Struct(
    "StateTransfer", "VhostUserTransferDeviceState", "direction:I phase:I"
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
    _LOG,
    _STATE_TRANSFER,
    _FS_CONFIG,
)

# --- Numbers ---

ENUMS: Final = (
    Enum("RequestNumber", {row.name: row.number for row in REQUESTS}),
    Flags("HeaderFlag", {"VERSION_1": 0x1, "REPLY": 0x4, "NEED_REPLY": 0x8}),
    # The low byte of the payload of SET_VRING_KICK, _CALL and _ERR is the number of the vring; that
    # of the reply to SET_DEVICE_STATE_FD is an error.
    Flags("VringFd", {"NONE": 0x100}),
    # VringAddr.flags.
    Flags("VringFlag", {"LOG": 0x1}),
    Enum("StateDirection", {"SAVE": 0, "LOAD": 1}),
    Enum("StatePhase", {"STOPPED": 0}),
    Flags(
        "VirtioFeature",
        {
            "LOG_ALL": 1 << 26,
            "INDIRECT_DESC": 1 << 28,
            "EVENT_IDX": 1 << 29,
            "PROTOCOL_FEATURES": 1 << 30,  # of vhost-user only; never offered to the guest
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
