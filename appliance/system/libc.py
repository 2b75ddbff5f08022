"""System calls that Python's standard library lacks, and ioctl(2) requests of /dev/fuse.

Every function raises an OSError with the errno of the call, unless its docstring says otherwise.
Loading ctypes takes as long as loading a small program, so a command that may not need these calls
imports this module late.
"""

import ctypes
import fcntl
import mmap
import os
import struct
import sys
from typing import Final

MS_RDONLY: Final = 1 << 0
MS_NOSUID: Final = 1 << 1
MS_NODEV: Final = 1 << 2
MS_NOEXEC: Final = 1 << 3
MS_REMOUNT: Final = 1 << 5

# linux/sched.h.
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWUSER: Final = 0x10000000
CLONE_NEWNET: Final = 0x40000000

# linux/capability.h.
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SYS_ADMIN: Final = 21

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
# linux/capability.h: version 3 has two sets of 32 capabilities, each as effective, permitted and
# inheritable.
_CAPABILITY_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_CAPABILITY_SETS: Final = struct.Struct("=6I")
_MNT_DETACH: Final = 2
# sys/inotify.h; the flags of the descriptor are those of open(2).
_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED_TO: Final = 0x80
_IN_DELETE: Final = 0x200
_IN_ONLYDIR: Final = 0x01000000
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

_DONTNEED: Final = 4  # MADV_DONTNEED
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


def set_no_new_privileges() -> None:
    """Let no program that this process executes gain privileges (prctl(2))."""
    _check(_LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def forbid_dumps() -> None:
    """Let no other process of this user inspect this one, and write no core dump (prctl(2))."""
    _check(_LIBC.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def unshare(flags: int) -> None:
    """Move this process to new namespaces; `flags` combines `CLONE_` constants (unshare(2))."""
    _check(_LIBC.unshare(flags), "unshare")


def effective_capabilities() -> int:
    """Return the effective capabilities of this process as a set of bits (capget(2))."""
    sets = ctypes.create_string_buffer(_CAPABILITY_SETS.size)
    _check(_LIBC.capget(ctypes.create_string_buffer(_CAPABILITY_HEADER), sets), "capget")
    low, _, _, high, _, _ = _CAPABILITY_SETS.unpack(sets.raw)
    return int(low | high << 32)


def drop_capabilities() -> None:
    """Give up all capabilities (capset(2))."""
    header = ctypes.create_string_buffer(_CAPABILITY_HEADER)
    _check(_LIBC.capset(header, _CAPABILITY_SETS.pack(0, 0, 0, 0, 0, 0)), "capset")


def set_seccomp_filter(program: bytes) -> None:
    """Filter the system calls of this process by `program`, an array of struct sock_filter.

    It cannot be removed. Privileges or `set_no_new_privileges` are needed (prctl(2)).
    """
    # struct sock_fprog. prctl rather than seccomp(2), which filters of service managers may refuse.
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _check(_LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, fprog, 0, 0), "prctl(PR_SET_SECCOMP)")


def system_call(number: int, *arguments: int | bytes | None) -> int:
    """Make a system call that the C library has no function for (syscall(2)).

    Args:
        number: the number of the system call on this machine.
        *arguments: numbers, and structures as bytes.
    """
    values = (ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)
    result = int(_LIBC.syscall(ctypes.c_long(number), *values))
    _check(min(result, 0), "")
    return result


def lock_memory(memory: mmap.mmap) -> None:
    """Keep all pages of `memory`, which must be writable, in RAM until it is closed (mlock(2))."""
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    _check(_LIBC.mlock(ctypes.c_void_p(start), ctypes.c_size_t(len(memory))), "")


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


def watch_directory(path: str | os.PathLike[str]) -> int:
    """Return a non-blocking descriptor, owned by the caller, that reads what changes in `path`.

    It is readable when a file there was replaced, written or deleted (inotify(7)).
    """
    fd = _LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    _check(min(fd, 0), path)
    mask = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_DELETE | _IN_ONLYDIR
    try:
        _check(min(_LIBC.inotify_add_watch(fd, os.fsencode(path), mask), 0), path)
    except OSError:
        os.close(fd)
        raise
    return int(fd)


def mode_now(path: str | os.PathLike[str]) -> int:
    """Return the mode of the file at `path` as its file system reports it now (statx(2)).

    Unlike stat(2), this is never answered from attributes that the kernel has cached, so it fails
    if the server of a FUSE mount is gone.
    """
    result = ctypes.create_string_buffer(_STATX_SIZE)
    arguments = (os.fsencode(path), _AT_STATX_FORCE_SYNC, _STATX_TYPE_AND_MODE, result)
    _check(_LIBC.statx(_AT_FDCWD, *arguments), path)
    return int.from_bytes(result.raw[_STATX_MODE_AT : _STATX_MODE_AT + 2], sys.byteorder)


def drop_mapped_pages(file: str) -> None:
    """Take the pages of a mapped file out of this process; they stay in the page cache.

    The map itself stays as it is, and whatever is read in it is mapped again (madvise(2),
    MADV_DONTNEED on a shared mapping).

    Args:
        file: the absolute path of the file, as /proc/self/maps has it.
    """
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:  # noqa: PTH123
        for line in maps:
            if line.rstrip("\n").endswith(f" {file}"):
                start, _, end = line.partition(" ")[0].partition("-")
                size = int(end, 16) - int(start, 16)
                _LIBC.madvise(ctypes.c_void_p(int(start, 16)), ctypes.c_size_t(size), _DONTNEED)


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
