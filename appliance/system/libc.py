"""System calls that Python's standard library lacks, and ioctl(2) requests of /dev/fuse.

Every function raises an OSError with the errno of the call, unless its docstring says otherwise.
Loading ctypes takes as long as loading a small program, so a command that may not need these calls
imports this module late.
"""

import ctypes
import fcntl
import os
import sys
from typing import Final

MS_RDONLY: Final = 1 << 0
MS_NOSUID: Final = 1 << 1
MS_NODEV: Final = 1 << 2
MS_NOEXEC: Final = 1 << 3
MS_REMOUNT: Final = 1 << 5

_PR_SET_PDEATHSIG: Final = 1
_MNT_DETACH: Final = 2
_SYNC_FILE_RANGE_WRITE: Final = 2
# From malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
# linux/stat.h: struct statx has 256 bytes, with `stx_mode` at byte 28.
_AT_FDCWD: Final = -100
_AT_STATX_FORCE_SYNC: Final = 0x2000
_STATX_TYPE_AND_MODE: Final = 0x3
_STATX_SIZE: Final = 256
_STATX_MODE_AT: Final = 28
# linux/fuse.h: type 229; _IOR(0, uint32_t), _IOW(1, struct fuse_backing_map), _IOW(2, uint32_t).
_FUSE_DEV_IOC_CLONE: Final = 0x8004E500
_FUSE_DEV_IOC_BACKING_OPEN: Final = 0x4010E501
_FUSE_DEV_IOC_BACKING_CLOSE: Final = 0x4004E502

_WHOLE_FILE: Final = ctypes.c_int64(0)
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def signal_on_parent_death(number: int, parent_pid: int) -> None:
    """Have the kernel send signal `number` to this process when its parent ends (prctl(2)).

    If the parent is no longer `parent_pid`, it has already ended, and this process exits at once
    with status 1.
    """
    _check(_LIBC.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def syncfs(fd: int) -> None:
    """Write everything in the file system that `fd` is on to disk (syncfs(2))."""
    _check(_LIBC.syncfs(fd), "")


def fallocate(fd: int, size: int) -> None:
    """Reserve disk space for the first `size` bytes of the file `fd` (fallocate(2)).

    Fails if the file system cannot reserve space. posix_fallocate(3) would write to the file
    instead, which is wrong while other processes have it mapped.
    """
    _check(_LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)), "")


def start_writeback(fd: int) -> None:
    """Ask the kernel to start writing the file `fd` to disk, without waiting (sync_file_range(2)).

    This is only advice. Errors are ignored here; they are reported when the file is synced.
    """
    _LIBC.sync_file_range(fd, _WHOLE_FILE, _WHOLE_FILE, _SYNC_FILE_RANGE_WRITE)


def mount(source: str, path: str | os.PathLike[str], fs_type: str, flags: int, data: str) -> None:
    """Mount a file system at `path` (mount(2)).

    Args:
        source: what lists of mounts show as the source.
        path: the mount point.
        fs_type: the type of the file system.
        flags: a combination of `MS_` constants.
        data: options that the file system itself parses.
    """
    arguments = (os.fsencode(source), os.fsencode(path), fs_type.encode(), flags, data.encode())
    _check(_LIBC.mount(*arguments), path)


def remount(path: str | os.PathLike[str], flags: int) -> None:
    """Change the flags of the mount at `path` to the `MS_` constants in `flags` (mount(2))."""
    _check(_LIBC.mount(None, os.fsencode(path), None, MS_REMOUNT | flags, None), path)


def detach_mount(path: str | os.PathLike[str]) -> None:
    """Detach the mount at `path` from the tree, even if it is in use (umount2(2), MNT_DETACH)."""
    _check(_LIBC.umount2(os.fsencode(path), _MNT_DETACH), path)


def mode_now(path: str | os.PathLike[str]) -> int:
    """Return the mode of the file at `path` as its file system reports it now (statx(2)).

    Unlike stat(2), this is never answered from attributes that the kernel has cached, so it fails
    if the server of a FUSE mount is gone.
    """
    result = ctypes.create_string_buffer(_STATX_SIZE)
    arguments = (os.fsencode(path), _AT_STATX_FORCE_SYNC, _STATX_TYPE_AND_MODE, result)
    _check(_LIBC.statx(_AT_FDCWD, *arguments), path)
    return int.from_bytes(result.raw[_STATX_MODE_AT : _STATX_MODE_AT + 2], sys.byteorder)


def tune_malloc(*, mmap_threshold: int, trim_threshold: int, num_arenas: int) -> None:
    """Configure glibc's allocator (mallopt(3)); do nothing with another C library.

    Args:
        mmap_threshold: allocations of at least this many bytes are mapped individually.
        trim_threshold: free bytes at the top of the heap beyond which they are returned.
        num_arenas: the largest number of arenas.
    """
    if hasattr(_LIBC, "mallopt"):
        _LIBC.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        _LIBC.mallopt(_M_TRIM_THRESHOLD, trim_threshold)
        _LIBC.mallopt(_M_ARENA_MAX, num_arenas)


def clone_fuse_device(fd: int, mount_fd: int) -> None:
    """Attach `fd`, newly opened on /dev/fuse, to the mount that `mount_fd` serves; both lent."""
    fcntl.ioctl(fd, _FUSE_DEV_IOC_CLONE, mount_fd.to_bytes(4, sys.byteorder))


def open_fuse_backing(device_fd: int, backing_map: bytes) -> int:
    """Register a backing file with a mount and return its backing id.

    Args:
        device_fd: a /dev/fuse descriptor of the mount (lent).
        backing_map: a packed `struct fuse_backing_map`, which holds the file's descriptor.
    """
    return int(fcntl.ioctl(device_fd, _FUSE_DEV_IOC_BACKING_OPEN, bytearray(backing_map)))


def close_fuse_backing(device_fd: int, backing_id: int) -> None:
    """Release a backing id that `open_fuse_backing` returned for the mount of `device_fd`."""
    fcntl.ioctl(device_fd, _FUSE_DEV_IOC_BACKING_CLOSE, backing_id.to_bytes(4, sys.byteorder))


def _check(result: int, path: str | os.PathLike[str]) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(path))
