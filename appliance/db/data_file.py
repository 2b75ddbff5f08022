"""Checks of the two files of an LMDB environment, made before LMDB maps them.

LMDB trusts its files, and what it then runs into is a signal or silent damage rather than an error.
Three cases are ruled out here:

* `data.mdb` is shorter than it says. LMDB believes what the file says of its own length, and a read
  past the end of the file is SIGBUS. `check_data` compares the size of the file with the last page
  that the newer of its two meta pages names. A shorter file is still intact if all the pages that
  it lacks are free, since LMDB does not write free pages. To find out, `check_data` walks the free
  list, a B-tree in the same file, with pread; its pages cannot be trusted either, and a
  contradiction among them counts as truncation. A writer may commit during the walk, so a walk that
  failed is repeated if the meta page has changed since.
* `lock.mdb` has no disk space. LMDB creates it as a sparse file and writes to it through its map;
  on a full disk the first write to a hole is SIGBUS. `allocate_lock` reserves the blocks first.
* The process id is taken. LMDB knows a process by its id, by a lock on the byte of `lock.mdb` with
  that offset. Two processes in two PID namespaces may have the same id, and would be taken for one.
  `check_pid` asks whether another process has locked the byte of this one.

Layout of `data.mdb` (mdb.c: MDB_page, MDB_meta, MDB_node; 64-bit machines, native byte order):

    page       header: number u64, padding u16, flags u16, lower u16, upper u16; an overflow page
               has a number of pages u32 in place of the last two
    page 0, 1  header, magic u32, version u32, address u64, map size u64, record of the free list
               (48 bytes, begins with the page size as u32, ends with its root page as u64), record
               of the main database (48 bytes), last page u64, transaction u64
    others     header, offset of each node u16 up to `lower`, nodes
    node       low u16, high u16, flags u16, size of the key u16, key, value; on a branch page,
               low, high and flags are the 48-bit number of the child, on a leaf page low and high
               are the 32-bit size of the value
    free list  key: transaction u64; value: number of pages u64, the pages u64 each
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from appliance.errors import FULL_ERRNOS, PidInUseError, StoreError, disk_error

_PAGE_HEADER: Final = struct.Struct("=QHHHH")
_META: Final = struct.Struct("=16xIIQQI36xQ48xQQ")
_NODE: Final = struct.Struct("=HHHH")
_NUMBER: Final = struct.Struct("=Q")
_MAGIC: Final = 0xBEEFC0DE
_META_PAGE_MIN: Final = 4096
_PAGE_SIZES: Final = frozenset(1 << bits for bits in range(9, 17))
_BRANCH: Final = 1
_LEAF: Final = 2
_BIG_DATA: Final = 1
_NO_ROOT: Final = (1 << 64) - 1
_DEPTH_MAX: Final = 32
# How often the free list is read, as a writer may commit meanwhile.
_ATTEMPTS: Final = 10

# mdb.c: the size of MDB_txninfo with one MDB_reader, and of each further reader.
_LOCK_FIXED: Final = 192
_LOCK_READER: Final = 64
# fcntl.h: struct flock on 64-bit Linux.
_FLOCK: Final = struct.Struct("=hhiqqi4x")


class _Meta(NamedTuple):
    transaction: int
    last_page: int
    page_size: int
    free_root: int

    @property
    def size_bytes(self) -> int:
        return (self.last_page + 1) * self.page_size


class _BadPageError(Exception):
    """A page contradicts the page that refers to it."""


def check_data(path: Path) -> int:
    """Return the size of `data.mdb` in the directory `path`, once it is safe to map.

    The size is 0 if the file does not exist, or is still empty.

    Raises:
        StoreError: the file is not an LMDB database, or is truncated.
        OSError: the file cannot be read.
    """
    name = path / "data.mdb"
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            return 0
        meta = _read_meta(fd, name)
        for _attempt in range(_ATTEMPTS):
            size = os.fstat(fd).st_size
            if size >= meta.size_bytes or _ends_with_free_pages(fd, meta, size):
                return size
            before, meta = meta, _read_meta(fd, name)
            if meta == before:
                break
        raise StoreError(f"{name}: truncated: has {size} bytes, expected {meta.size_bytes}")
    finally:
        os.close(fd)


def allocate_lock(path: Path, max_readers: int) -> None:
    """Reserve the disk space of `lock.mdb` in the directory `path`; creates the file if needed.

    Raises:
        StoreFullError: the disk is full.
        OSError: the file cannot be created, or opened for writing.
    """
    size = _LOCK_FIXED + _LOCK_READER * (max_readers - 1)
    name = path / "lock.mdb"
    # Closing any descriptor of a file ends the process's locks on it; there are none yet.
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        status = os.fstat(fd)
        if status.st_size < size or status.st_blocks * 512 < status.st_size:
            _allocate(fd, name, max(size, status.st_size))
    finally:
        os.close(fd)


def check_pid(path: Path) -> None:
    """Check that no other process that has the environment at `path` open has this process's id.

    This process must not have the environment open itself.

    Raises:
        PidInUseError: another process has the same id.
        OSError: `lock.mdb` cannot be opened.
    """
    name = path / "lock.mdb"
    fd = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        pid = os.getpid()
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, pid, 1, 0)
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, question)
    finally:
        os.close(fd)
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        raise PidInUseError(str(name), pid)


def is_pid_free(path: Path) -> bool:
    """Whether no other process at `path` has this id; True if `lock.mdb` cannot be opened."""
    try:
        check_pid(path)
    except PidInUseError:
        return False
    except OSError:
        return True
    return True


def is_written_by_nobody(path: Path) -> bool:
    """Whether the file system of `path` itself is read-only, not just this mount of it."""
    if not os.statvfs(path).f_flag & os.ST_RDONLY:
        return False
    status = path.stat()
    device = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    return any(fields[2] == device and "ro" in fields[-1].split(",") for fields in _mounts())


def _mounts() -> Iterator[list[str]]:
    # proc(5): the third field is the device, the last has the options of the file system itself.
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            yield line.split()


def _allocate(fd: int, name: Path, size: int) -> None:
    from appliance.system import libc  # noqa: PLC0415 - loading ctypes takes long; rarely needed

    try:
        libc.fallocate(fd, size)
    except OSError as exc:
        if exc.errno in FULL_ERRNOS:
            raise disk_error(OSError(exc.errno, exc.strerror, os.fspath(name)), name) from exc
        if exc.errno not in {errno.EOPNOTSUPP, errno.ENOSYS}:
            raise OSError(exc.errno, exc.strerror, os.fspath(name)) from exc


def _read_meta(fd: int, name: Path) -> _Meta:
    first = _meta_at(fd, 0)
    second = None if first is None else _meta_at(fd, first.page_size)
    if first is None or second is None:
        raise StoreError(f"{name}: not an LMDB database, or truncated")
    return max(first, second)


def _meta_at(fd: int, offset: int) -> _Meta | None:
    page = os.pread(fd, _META_PAGE_MIN, offset)
    if len(page) < _META.size:
        return None
    magic, _version, _address, _map_size, page_size, root, last_page, transaction = (
        _META.unpack_from(page)
    )
    if magic != _MAGIC or page_size not in _PAGE_SIZES:
        return None
    return _Meta(transaction, last_page, page_size, root)


def _ends_with_free_pages(fd: int, meta: _Meta, size: int) -> bool:
    missing = set(range(size // meta.page_size, meta.last_page + 1))
    try:
        for pages in _free_pages(fd, meta, meta.free_root, 0):
            missing.difference_update(pages)
            if not missing:
                return True
    except (_BadPageError, struct.error, IndexError):
        return False
    return False


def _free_pages(fd: int, meta: _Meta, number: int, depth: int) -> Iterator[list[int]]:
    if number == _NO_ROOT:
        return
    page = _read(fd, number * meta.page_size, meta.page_size)
    _number, _padding, flags, lower, _upper = _PAGE_HEADER.unpack_from(page)
    if depth > _DEPTH_MAX or not flags & (_BRANCH | _LEAF):
        raise _BadPageError
    for (at,) in struct.iter_unpack("=H", page[_PAGE_HEADER.size : lower]):
        low, high, node_flags, key_size = _NODE.unpack_from(page, at)
        if flags & _BRANCH:
            child = low | high << 16 | node_flags << 32
            yield from _free_pages(fd, meta, child, depth + 1)
            continue
        value_at, value_size = at + _NODE.size + key_size, low | high << 16
        if node_flags & _BIG_DATA:
            (overflow,) = _NUMBER.unpack_from(page, value_at)
            value = _read(fd, overflow * meta.page_size + _PAGE_HEADER.size, value_size)
        else:
            value = page[value_at : value_at + value_size]
        (count,) = _NUMBER.unpack_from(value)
        yield list(struct.unpack_from(f"={count}Q", value, _NUMBER.size))


def _read(fd: int, offset: int, size: int) -> bytes:
    data = os.pread(fd, size, offset)
    if len(data) < size:
        raise _BadPageError
    return data
