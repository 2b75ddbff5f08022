"""INIT negotiation: a pure function from what the guest offers to what both then do."""

from errno import EPROTO
from typing import Final, NamedTuple

from appliance.fuse_proto._fuse_wire import InitFlag, InitIn, InitOut

MAJOR: Final = 7
MINOR: Final = 45
# From this one on (Linux 6.16) EXPORT_SUPPORT does harm: fuse_dentry_revalidate() takes a dentry
# that came from a file handle for one of an earlier epoch, without asking, and overlayfs with
# index=on, xino=on or metacopy=on says ESTALE of a file that it has copied up and now finds by its
# handle.
EPOCH_MINOR: Final = 44
# The first with MAX_PAGES and CACHE_SYMLINKS (Linux 4.20); virtiofs came later still.
OLDEST_MINOR: Final = 28

# Everything below a store path is immutable, so nothing is revalidated and all reads may overlap.
# The two *_SUPPORT flags only acknowledge: what stops OPEN and OPENDIR is their ENOSYS.
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
    # LOOKUP of ".", ".." and "/" is answered: file handles outlive what the guest's kernel caches.
    | InitFlag.EXPORT_SUPPORT
)
# On /dev/fuse a server may ask for requests to be sent again that a dead worker had read.
DEVICE_FLAGS: Final = WANTED_FLAGS | InitFlag.HAS_RESEND
# Files are opened, and the kernel reads those that have a backing file without us.
PASSTHROUGH_FLAGS: Final = (DEVICE_FLAGS | InitFlag.PASSTHROUGH) & ~InitFlag.NO_OPEN_SUPPORT
# A backing file may lie on a plain file system only, not on a stacked one.
MAX_STACK_DEPTH: Final = 1
MAX_PAGES: Final = 256  # 1 MiB per READ, the most Linux allows without a sysctl
# Linux takes the smaller of this and its own setting, so it can only be too low.
MAX_READAHEAD: Final = 1 << 20
# Readahead is skipped while more than the threshold is under way.
MAX_BACKGROUND: Final = 0xFFFF
CONGESTION_THRESHOLD: Final = MAX_BACKGROUND // 4 * 3
# The least Linux accepts; nothing is ever written, but /dev/fuse readers size their buffer by it.
MAX_WRITE: Final = 4096
TIME_GRAN_NS: Final = 1


class Agreement(NamedTuple):
    """The outcome of one INIT. Not final: the guest is newer and will send another INIT."""

    reply: InitOut
    is_final: bool
    minor: int
    flags: InitFlag
    max_readahead: int


def negotiate(offer: InitIn, wanted: InitFlag = WANTED_FLAGS) -> Agreement:
    """Return what to answer to `offer`, and the values of the session it starts.

    Args:
        offer: what the guest's kernel can do.
        wanted: the flags to agree to where they are offered.

    Raises:
        OSError: EPROTO; the guest's protocol is older than any we speak.

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
    # linux/fuse.h 7.36: without INIT_EXT the upper word is not there, whatever it holds.
    is_extended = offer.flags & InitFlag.INIT_EXT
    return InitFlag(offer.flags | (offer.flags2 << 32 if is_extended else 0))
