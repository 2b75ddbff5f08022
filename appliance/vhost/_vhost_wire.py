"""Wire codec, generated from tools.vhost_table by tools.wiregen; do not edit."""

import sys
from collections.abc import Callable
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Any, NamedTuple

Buffer = bytes | bytearray | memoryview

if sys.byteorder != "little":
    raise ImportError("the wire codecs need a little-endian host")


class RequestNumber(IntEnum):
    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class HeaderFlag(IntFlag):
    VERSION_1 = 0x1
    REPLY = 0x4
    NEED_REPLY = 0x8


class VringFd(IntFlag):
    NONE = 0x100


class VringFlag(IntFlag):
    LOG = 0x1


class StateDirection(IntEnum):
    SAVE = 0
    LOAD = 1


class StatePhase(IntEnum):
    STOPPED = 0


class VirtioFeature(IntFlag):
    LOG_ALL = 0x4000000
    INDIRECT_DESC = 0x10000000
    EVENT_IDX = 0x20000000
    PROTOCOL_FEATURES = 0x40000000
    VERSION_1 = 0x100000000


class ProtocolFeature(IntFlag):
    MQ = 0x1
    LOG_SHMFD = 0x2
    RARP = 0x4
    REPLY_ACK = 0x8
    NET_MTU = 0x10
    BACKEND_REQ = 0x20
    CROSS_ENDIAN = 0x40
    CRYPTO_SESSION = 0x80
    PAGEFAULT = 0x100
    CONFIG = 0x200
    BACKEND_SEND_FD = 0x400
    HOST_NOTIFIER = 0x800
    INFLIGHT_SHMFD = 0x1000
    RESET_DEVICE = 0x2000
    INBAND_NOTIFICATIONS = 0x4000
    CONFIGURE_MEM_SLOTS = 0x8000
    STATUS = 0x10000
    XEN_MMAP = 0x20000
    SHARED_OBJECT = 0x40000
    DEVICE_STATE = 0x80000
    GET_VRING_BASE_INFLIGHT = 0x100000
    GPA_ADDRESSES = 0x200000
    SHMEM = 0x400000
    GET_VRING_BASE_SKIP_DRAIN = 0x800000


class Header(NamedTuple):
    request: int
    flags: int
    size: int


HEADER = Struct("<3I")
HEADER_SIZE = 12


def unpack_header(buf: Buffer, offset: int = 0) -> Header:
    return tuple.__new__(Header, HEADER.unpack_from(buf, offset))


def pack_header(value: Header) -> bytes:
    return HEADER.pack(*value)


class Word(NamedTuple):
    value: int


WORD = Struct("<Q")
WORD_SIZE = 8


def unpack_word(buf: Buffer, offset: int = 0) -> Word:
    return tuple.__new__(Word, WORD.unpack_from(buf, offset))


def pack_word(value: Word) -> bytes:
    return WORD.pack(*value)


class VringState(NamedTuple):
    ring: int
    num: int


VRING_STATE = Struct("<2I")
VRING_STATE_SIZE = 8


def unpack_vring_state(buf: Buffer, offset: int = 0) -> VringState:
    return tuple.__new__(VringState, VRING_STATE.unpack_from(buf, offset))


def pack_vring_state(value: VringState) -> bytes:
    return VRING_STATE.pack(*value)


class VringAddr(NamedTuple):
    ring: int
    flags: int
    desc: int
    used: int
    avail: int
    log_guest_addr: int


VRING_ADDR = Struct("<2I4Q")
VRING_ADDR_SIZE = 40


def unpack_vring_addr(buf: Buffer, offset: int = 0) -> VringAddr:
    return tuple.__new__(VringAddr, VRING_ADDR.unpack_from(buf, offset))


def pack_vring_addr(value: VringAddr) -> bytes:
    return VRING_ADDR.pack(*value)


class Region(NamedTuple):
    gpa: int
    size: int
    user_addr: int
    mmap_offset: int


REGION = Struct("<4Q")
REGION_SIZE = 32


def unpack_region(buf: Buffer, offset: int = 0) -> Region:
    return tuple.__new__(Region, REGION.unpack_from(buf, offset))


def pack_region(value: Region) -> bytes:
    return REGION.pack(*value)


class MemTable(NamedTuple):
    num_regions: int


MEM_TABLE = Struct("<I4x")
MEM_TABLE_SIZE = 8


def unpack_mem_table(buf: Buffer, offset: int = 0) -> MemTable:
    return tuple.__new__(MemTable, MEM_TABLE.unpack_from(buf, offset))


def pack_mem_table(value: MemTable) -> bytes:
    return MEM_TABLE.pack(*value)


class MemReg(NamedTuple):
    region: Region


MEM_REG = Struct("<8x4Q")
MEM_REG_SIZE = 40


def unpack_mem_reg(buf: Buffer, offset: int = 0) -> MemReg:
    flat = MEM_REG.unpack_from(buf, offset)
    return MemReg._make((tuple.__new__(Region, flat[0:4]),))


def pack_mem_reg(value: MemReg) -> bytes:
    return MEM_REG.pack(*value.region)


class Config(NamedTuple):
    offset: int
    size: int
    flags: int


CONFIG = Struct("<3I")
CONFIG_SIZE = 12


def unpack_config(buf: Buffer, offset: int = 0) -> Config:
    return tuple.__new__(Config, CONFIG.unpack_from(buf, offset))


def pack_config(value: Config) -> bytes:
    return CONFIG.pack(*value)


class Inflight(NamedTuple):
    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int


INFLIGHT = Struct("<2Q2H4x")
INFLIGHT_SIZE = 24


def unpack_inflight(buf: Buffer, offset: int = 0) -> Inflight:
    return tuple.__new__(Inflight, INFLIGHT.unpack_from(buf, offset))


def pack_inflight(value: Inflight) -> bytes:
    return INFLIGHT.pack(*value)


class Log(NamedTuple):
    mmap_size: int
    mmap_offset: int


LOG = Struct("<2Q")
LOG_SIZE = 16


def unpack_log(buf: Buffer, offset: int = 0) -> Log:
    return tuple.__new__(Log, LOG.unpack_from(buf, offset))


def pack_log(value: Log) -> bytes:
    return LOG.pack(*value)


class StateTransfer(NamedTuple):
    direction: int
    phase: int


STATE_TRANSFER = Struct("<2I")
STATE_TRANSFER_SIZE = 8


def unpack_state_transfer(buf: Buffer, offset: int = 0) -> StateTransfer:
    return tuple.__new__(StateTransfer, STATE_TRANSFER.unpack_from(buf, offset))


def pack_state_transfer(value: StateTransfer) -> bytes:
    return STATE_TRANSFER.pack(*value)


class FsConfig(NamedTuple):
    tag: bytes
    num_request_queues: int


FS_CONFIG = Struct("<36sI")
FS_CONFIG_SIZE = 40


def unpack_fs_config(buf: Buffer, offset: int = 0) -> FsConfig:
    return tuple.__new__(FsConfig, FS_CONFIG.unpack_from(buf, offset))


def pack_fs_config(value: FsConfig) -> bytes:
    return FS_CONFIG.pack(*value)


class _Codec(NamedTuple):
    size: int
    unpack: Callable[[Buffer, int], tuple[Any, ...]]
    pack: Callable[[Any], bytes]


CODECS = {
    "Header": _Codec(HEADER_SIZE, unpack_header, pack_header),
    "Word": _Codec(WORD_SIZE, unpack_word, pack_word),
    "VringState": _Codec(VRING_STATE_SIZE, unpack_vring_state, pack_vring_state),
    "VringAddr": _Codec(VRING_ADDR_SIZE, unpack_vring_addr, pack_vring_addr),
    "Region": _Codec(REGION_SIZE, unpack_region, pack_region),
    "MemTable": _Codec(MEM_TABLE_SIZE, unpack_mem_table, pack_mem_table),
    "MemReg": _Codec(MEM_REG_SIZE, unpack_mem_reg, pack_mem_reg),
    "Config": _Codec(CONFIG_SIZE, unpack_config, pack_config),
    "Inflight": _Codec(INFLIGHT_SIZE, unpack_inflight, pack_inflight),
    "Log": _Codec(LOG_SIZE, unpack_log, pack_log),
    "StateTransfer": _Codec(STATE_TRANSFER_SIZE, unpack_state_transfer, pack_state_transfer),
    "FsConfig": _Codec(FS_CONFIG_SIZE, unpack_fs_config, pack_fs_config),
}
