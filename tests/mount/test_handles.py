"""File handles of a mount, as NFS servers and overlayfs keep them: name_to_handle_at(2).

Kernels to which none are offered (`HANDLES_AIL`) may call them stale, but take none for another
file. Guests have other kernels: vm-tests/test_guest_overlay.py.
"""

import contextlib
import ctypes
import errno
import os
import random
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.store.store import Store
from tests.fakes.mounted import Mounted
from tests.fakes.overlaid import HANDLES_AIL
from tests.fs.guest import File, Link, Tree, put

pytestmark = pytest.mark.slow

DIRECTORIES = 100
FILES_EACH = 96
NODES = 10_000
EQUAL = b"equal"

_MAX_HANDLE_SZ = 128
_libc = ctypes.CDLL(None, use_errno=True)


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint32),
        ("handle_type", ctypes.c_int32),
        ("f_handle", ctypes.c_ubyte * _MAX_HANDLE_SZ),
    )


class Handle(NamedTuple):
    """A handle as the file system made it."""

    kind: int
    data: bytes


def handle_of(path: str) -> Handle:
    handle = _FileHandle(handle_bytes=_MAX_HANDLE_SZ)
    mount_id = ctypes.c_int()
    arguments = (os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount_id), 0)
    if _libc.name_to_handle_at(-100, *arguments):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
    return Handle(handle.handle_type, bytes(handle.f_handle[: handle.handle_bytes]))


def open_handle(mount_fd: int, handle: Handle, flags: int) -> int:
    """Return a descriptor.

    Raises:
        OSError: ESTALE, there is no such inode (any more).
    """
    made = _FileHandle(len(handle.data), handle.kind)
    ctypes.memmove(made.f_handle, handle.data, len(handle.data))
    fd: int = _libc.open_by_handle_at(mount_fd, ctypes.byref(made), flags | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def name_of(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


def drop_inodes() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


def content_of(number: int, index: int) -> bytes:
    """Return an equal content for half the files, another for each of the others."""
    return EQUAL if index % 2 else b"%d/%d" % (number, index)


def tree() -> Tree:
    directories = {}
    for number in range(DIRECTORIES):
        files: dict[bytes, File | Link | Tree] = {
            b"f%02d" % index: File(content_of(number, index)) for index in range(FILES_EACH)
        }
        directories[b"d%02d" % number] = files | {
            b"link": Link(b"f00"),
            b"hollow": {},
            b"same": {b"file": File(EQUAL)},
        }
    return directories


@pytest.fixture(scope="module")
def names(store: Path) -> list[str]:
    opened = Store.open(store, create=True)
    # Equal trees, so that a handle could be taken for one of the other.
    names = [os.fsdecode(put(opened, name, tree())) for name in ("one", "other")]
    opened.close()
    return names


class Found(NamedTuple):
    """What there is to know of a node without its handle."""

    path: str
    handle: Handle
    mode: int
    inode: int
    content: object

    def flags(self) -> int:
        if stat.S_ISLNK(self.mode):
            return os.O_PATH | os.O_NOFOLLOW
        return os.O_RDONLY


def content(mode: int, fd: int) -> object:
    if stat.S_ISLNK(mode):
        return os.readlink("", dir_fd=fd)
    if stat.S_ISDIR(mode):
        return sorted(os.listdir(fd))
    return os.pread(fd, 64, 0)


def found_at(path: str) -> Found:
    mode = os.lstat(path).st_mode
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW if stat.S_ISLNK(mode) else os.O_RDONLY)
    try:
        return Found(path, handle_of(path), mode, os.fstat(fd).st_ino, content(mode, fd))
    finally:
        os.close(fd)


def walk(root: Path) -> Iterator[Found]:
    yield found_at(str(root))
    for directory, subdirectories, files in os.walk(root):
        for name in (*subdirectories, *files):
            yield found_at(f"{directory}/{name}")


@contextlib.contextmanager
def root_of(mountpoint: Path) -> Iterator[int]:
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def check(root: int, found: Found) -> None:
    fd = open_unless_stale(root, found)
    if fd is None:
        assert HANDLES_AIL, found.path
        return
    try:
        status = os.fstat(fd)
        assert (status.st_mode, status.st_ino) == (found.mode, found.inode), found.path
        assert content(found.mode, fd) == found.content, found.path
        if stat.S_ISDIR(found.mode):
            # Linux had to look for all directories above.
            assert name_of(fd) == Path(found.path)
    finally:
        os.close(fd)


def open_unless_stale(root: int, found: Found) -> int | None:
    try:
        return open_handle(root, found.handle, found.flags())
    except OSError as exc:
        if exc.errno == errno.ESTALE:
            return None
        raise


@pytest.mark.parametrize("options", [[], ["--inodes=content"]], ids=["place", "content"])
def test_handles_lead_to_the_same_files_when_all_inodes_were_dropped(
    store: Path, names: list[str], mountpoint: Path, options: list[str]
) -> None:
    with Mounted(store, mountpoint, "--list-root", *options), root_of(mountpoint) as root:
        nodes = list(walk(mountpoint / names[0]))
        assert len(nodes) > NODES
        nodes += list(walk(mountpoint / names[1] / "d07"))
        random.Random(1).shuffle(nodes)
        assert len({found.handle for found in nodes}) == len(nodes)
        drop_inodes()
        for found in nodes:
            check(root, found)


def test_a_handle_of_a_deep_directory_finds_its_way_up(
    store: Path, names: list[str], mountpoint: Path
) -> None:
    with Mounted(store, mountpoint, "--list-root"), root_of(mountpoint) as root:
        deepest = [f"{mountpoint}/{name}/d{number:02}/same" for name in names for number in (3, 99)]
        nodes = [found_at(path) for path in deepest]
        for found in nodes:
            drop_inodes()
            fd = open_unless_stale(root, found)
            if fd is None:
                assert HANDLES_AIL
                continue
            assert name_of(fd) == Path(found.path)
            above = os.open("../..", os.O_RDONLY, dir_fd=fd)
            assert name_of(above) == Path(found.path).parents[1]
            os.close(above)
            os.close(fd)


def test_without_a_listing_of_the_root_directories_are_found_once_their_tree_was_named(
    store: Path, names: list[str], mountpoint: Path
) -> None:
    # Linux (exportfs_get_name) looks for a directory of which it has a handle in the listing of
    # the one above, up to one that it knows. For files it need not.
    with Mounted(store, mountpoint), root_of(mountpoint) as root:
        nodes = list(walk(mountpoint / names[0] / "d05"))
        drop_inodes()
        for found in nodes:
            if stat.S_ISDIR(found.mode):
                fd = open_unless_stale(root, found)
                assert fd is None or name_of(fd) == Path(found.path)
            else:
                check(root, found)
        tree_fd = os.open(mountpoint / names[0], os.O_PATH)
        drop_inodes()
        for found in nodes:
            check(root, found)
        os.close(tree_fd)


def test_a_handle_of_the_root_is_good(store: Path, names: list[str], mountpoint: Path) -> None:
    with Mounted(store, mountpoint), root_of(mountpoint) as root:
        handle = handle_of(str(mountpoint))
        drop_inodes()
        fd = open_handle(root, handle, os.O_RDONLY | os.O_DIRECTORY)
        assert os.path.samestat(os.fstat(fd), os.fstat(root))
        os.stat(names[1], dir_fd=fd)
        os.close(fd)


def test_handles_of_an_earlier_mount_lead_to_the_right_files_or_nowhere(
    store: Path, names: list[str], mountpoint: Path
) -> None:
    with Mounted(store, mountpoint):
        # The first name that is asked for in the root comes first in what it grants.
        for name in names:
            (mountpoint / name).lstat()
        handles = [found for name in names for found in walk(mountpoint / name / "d41")]
    for order in (names, names[::-1]):
        with Mounted(store, mountpoint), root_of(mountpoint) as root:
            for name in order:
                (mountpoint / name).lstat()
            for found in handles:
                fd = open_unless_stale(root, found)
                if fd is not None:
                    assert os.path.samestat(os.fstat(fd), os.lstat(found.path)), found.path
                    assert content(found.mode, fd) == found.content, found.path
                    os.close(fd)


def test_forged_handles_lead_nowhere(store: Path, names: list[str], mountpoint: Path) -> None:
    with Mounted(store, mountpoint) as mounted, root_of(mountpoint) as root:
        genuine = handle_of(f"{mountpoint}/{names[0]}/d00/f00")
        # Linux fs/fuse/inode.c, fuse_encode_fh(): both halves of the nodeid, the generation.
        _high, _low, generation, *_parent = struct.unpack(
            f"={len(genuine.data) // 4}I", genuine.data
        )
        for nodeid in (0, 2**32 - 1, 2**32, 2**63, 2**64 - 1, 10**6):
            for other in (generation, generation ^ 1, 0):
                data = struct.pack("=3I", nodeid >> 32, nodeid & 0xFFFFFFFF, other)
                with pytest.raises(OSError, match="Stale file handle"):
                    open_handle(root, Handle(genuine.kind, data), os.O_RDONLY)
        # Right numbers of another session.
        forged = genuine.data[:8] + struct.pack("=I", generation ^ 1) + genuine.data[12:]
        drop_inodes()
        with pytest.raises(OSError, match="Stale file handle"):
            open_handle(root, Handle(genuine.kind, forged), os.O_RDONLY)
        assert (mountpoint / names[0] / "d00" / "f00").read_bytes() == content_of(0, 0)
        assert "Traceback" not in mounted.log()
