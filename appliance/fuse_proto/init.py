"""INIT negotiation: a pure function from what the guest offers to what both sides then use."""

from errno import EPROTO
from typing import Final, NamedTuple

from appliance.fuse_proto._fuse_wire import InitFlag, InitIn, InitOut

MAJOR: Final = 7
MINOR: Final = 45
# From this minor version on (Linux 6.16) EXPORT_SUPPORT does harm. fuse_dentry_revalidate() takes a
# dentry that came from a file handle for one of an earlier epoch, without asking the server. Then
# overlayfs with index=on, xino=on or metacopy=on fails with ESTALE for a file that it has copied up
# and finds by its handle.
EPOCH_MINOR: Final = 44
# The first minor version with MAX_PAGES and CACHE_SYMLINKS (Linux 4.20); virtiofs is newer.
OLDEST_MINOR: Final = 28

# Everything below a store path is immutable, so nothing is revalidated and all reads may overlap.
# NO_OPEN_SUPPORT and NO_OPENDIR_SUPPORT only acknowledge that the kernel supports this; it stops
# sending OPEN and OPENDIR because they are answered ENOSYS.
WANTED_FLAGS: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.DO_READDIRPLUS
    | InitFlag.ASYNC_DIO
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.EXPLICIT_INVAL_DATA
    | InitFlag.MAX_PAGES
    | InitFlag.INIT_EXT
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.NO_OPENDIR_SUPPORT
    # LOOKUP of ".", ".." and "/" is answered, so file handles outlive the guest kernel's caches.
    | InitFlag.EXPORT_SUPPORT
)
# On /dev/fuse, a server may ask the kernel to resend the requests that a dead worker had read.
DEVICE_FLAGS: Final = WANTED_FLAGS | InitFlag.HAS_RESEND
# With passthrough, OPEN is answered, and the kernel reads files that have a backing file by itself.
PASSTHROUGH_FLAGS: Final = (DEVICE_FLAGS | InitFlag.PASSTHROUGH) & ~InitFlag.NO_OPEN_SUPPORT
# A backing file must be on a plain file system, not on a stacked one.
MAX_STACK_DEPTH: Final = 1
MAX_PAGES: Final = 256  # 1 MiB per READ, the most Linux allows without a sysctl
# In bytes. Linux uses the smaller of this and its own setting, so a large value does no harm.
MAX_READAHEAD: Final = 1 << 20
# Linux skips readahead while more background requests than the threshold are in flight.
MAX_BACKGROUND: Final = 0xFFFF
CONGESTION_THRESHOLD: Final = MAX_BACKGROUND // 4 * 3
# In bytes; the minimum that Linux accepts. Nothing is ever written, but the size of the buffers for
# reading /dev/fuse depends on it.
MAX_WRITE: Final = 4096
TIME_GRAN_NS: Final = 1


class Agreement(NamedTuple):
    """The outcome of one INIT.

    It is not final if the major version of the guest is newer; the guest then sends another INIT.
    """

    reply: InitOut
    is_final: bool
    minor: int
    flags: InitFlag
    max_readahead: int


def negotiate(offer: InitIn, wanted: InitFlag = WANTED_FLAGS) -> Agreement:
    """Return the reply to `offer`, and the values of the session that begins.

    Args:
        offer: what the guest's kernel supports.
        wanted: flags to agree to if they are offered.

    Raises:
        OSError: EPROTO; the guest's protocol is older than 7.28.

    Source: linux fs/fuse/inode.c: process_init_reply.
    """
    if offer.major > MAJOR:
        version_only = InitOut(MAJOR, *[0] * (len(InitOut._fields) - 1))
        return Agreement(version_only, is_final=False, minor=0, flags=InitFlag(0), max_readahead=0)
    if offer.major < MAJOR or offer.minor < OLDEST_MINOR:
        raise OSError(EPROTO, f"FUSE {offer.major}.{offer.minor} is older than 7.{OLDEST_MINOR}")
    minor = min(offer.minor, MINOR)
    flags = _offered_flags(offer) & wanted
    if offer.minor >= EPOCH_MINOR:
        flags &= ~InitFlag.EXPORT_SUPPORT
    readahead = max(offer.max_readahead, MAX_READAHEAD)
    reply = InitOut(
        major=MAJOR,
        minor=minor,
        max_readahead=readahead,
        flags=flags & 0xFFFFFFFF,
        max_background=MAX_BACKGROUND,
        congestion_threshold=CONGESTION_THRESHOLD,
        max_write=MAX_WRITE,
        time_gran=TIME_GRAN_NS,
        max_pages=MAX_PAGES if flags & InitFlag.MAX_PAGES else 0,
        map_alignment=0,
        flags2=flags >> 32,
        max_stack_depth=MAX_STACK_DEPTH if flags & InitFlag.PASSTHROUGH else 0,
        request_timeout=0,
    )
    return Agreement(reply, is_final=True, minor=minor, flags=flags, max_readahead=readahead)


def _offered_flags(offer: InitIn) -> InitFlag:
    # linux/fuse.h 7.36: without INIT_EXT, `flags2` has no meaning.
    is_extended = offer.flags & InitFlag.INIT_EXT
    return InitFlag(offer.flags | (offer.flags2 << 32 if is_extended else 0))
