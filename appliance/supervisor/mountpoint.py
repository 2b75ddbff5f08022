"""A mount point: checks, mount(2) or fusermount3, unmounting, and /dev/fuse descriptors."""

import contextlib
import errno
import logging
import os
import re
import socket
import stat
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

from appliance.errors import MountError
from appliance.fuse_proto._fuse_wire import (
    OUT_HEADER_SIZE,
    NotifyCode,
    OutHeader,
    pack_out_header,
)
from appliance.system import libc

_LOG = logging.getLogger(__name__)

FS_TYPE: Final = "fuse.appliance"
_DEVICE: Final = "/dev/fuse"
_READ_AHEAD_KIB: Final = 1024
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_FUSERMOUNT: Final = "fusermount3"
# The environment variable that names the socket over which fusermount3 sends the descriptor
# (libfuse util/fusermount.c).
_COMM_FD: Final = "_FUSE_COMMFD"


class MountEntry(NamedTuple):
    """A line of /proc/self/mountinfo (proc_pid_mountinfo(5))."""

    mount_id: int
    parent_id: int
    device: str
    """major:minor"""
    kind: str
    """The file system type."""


class MountFlags(NamedTuple):
    """Properties of a mount that the kernel enforces or shows."""

    source: str
    """What lists of mounts show as the source."""
    allows_other: bool
    """Whether other users than the one that mounted it have access."""
    is_noexec: bool
    """Whether programs cannot be executed from the mount."""


class Mountpoint:
    """A directory to mount on, and the mount; owns the mount's first /dev/fuse descriptor, `fd`.

    `fd` is -1 until `mount` has succeeded.
    """

    def __init__(self, path: Path, flags: MountFlags) -> None:
        """Check `path`, and unmount a mount of this program there whose server is gone.

        Raises:
            MountError: the path does not exist, is not a directory, or is a mount of another
                program whose server is gone.
        """
        self.path = path
        self.fd = -1
        # Resolved once, before mounting: resolving a path asks the file system that is mounted
        # there, and a new mount does not answer yet.
        self._where = os.path.realpath(path)
        self._flags = flags
        self._is_root = os.geteuid() == 0
        self._device = ""
        # Kept open, so that the mount can be found and unmounted even when no descriptor is free.
        self._mount_list = Path("/proc/self/mountinfo").open("rb", 0)  # noqa: SIM115 - see `close`
        try:
            self._check()
        except MountError:
            self._mount_list.close()
            raise

    def mount(self) -> None:
        """Mount; the kernel then waits for a reply to INIT on `fd` or a clone of it.

        Raises:
            MountError: the kernel or fusermount3 refused.
        """
        # Checked again, because the workers of a supervisor that was killed, and with them its
        # mount, may have lived until now.
        self._check()
        before = {entry.mount_id for entry in self._mounts()}
        options = "default_permissions" + ",allow_other" * self._flags.allows_other
        self.fd = self._mount(options) if self._is_root else self._fusermount(options)
        added = [entry for entry in self._mounts() if entry.mount_id not in before]
        self._device = connection_of(self.fd) or (added[-1].device if added else "")

    def probe(self) -> None:
        """Block until the mount answers, then raise its read-ahead if this process is root.

        Raises:
            OSError: the mount is gone.
        """
        self.path.stat()
        if not self._is_root:
            return
        # The reply to INIT can only lower the kernel's default.
        bdi = Path(f"/sys/class/bdi/{self._device}/read_ahead_kb")
        try:
            bdi.write_text(str(_READ_AHEAD_KIB))
        except OSError as exc:
            _LOG.info("%s: %s; the kernel reads large files in smaller pieces", bdi, exc.strerror)

    @property
    def is_mounted(self) -> bool:
        """Whether the mount is in the tree, even if its server is gone or it is covered."""
        return any(map(self._is_ours, self._mounts()))

    def unmount(self) -> None:
        """Detach the mount; processes that use it keep it until the descriptors are closed.

        If something else is mounted over it, both mounts stay, and a warning is logged.
        """
        entries = self._mounts()
        if not any(map(self._is_ours, entries)):
            return
        if not self._is_ours(entries[-1]):
            _LOG.warning("%s: something else is mounted over this mount, which stays", self.path)
            return
        self._take_away()
        # Below it there may be another mount of this program whose server has ended since.
        with contextlib.suppress(MountError):
            while self._is_one_of_this_kind_there() and self._mode() is None:
                self._remove_stale()

    def close(self) -> None:
        """Close the descriptors. The mount is dead once all clones are closed, too."""
        self._mount_list.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def clone(self) -> int:
        """Return a new /dev/fuse descriptor of the mount, which the caller owns.

        A reply must be written to the descriptor from which its request was read.

        Raises:
            OSError: the mount is gone, or there is no free descriptor.
        """
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            libc.clone_fuse_device(fd, self.fd)
        except OSError:
            os.close(fd)
            raise
        return fd

    def resend(self) -> None:
        """Have the kernel queue again all requests that were read and not answered, on any clone.

        Raises:
            OSError: the kernel cannot resend requests, or the mount is gone.
        """
        # This includes requests that living workers are about to answer. Their replies fail with
        # ENOENT, and whichever worker reads a request again answers it.
        os.write(self.fd, pack_out_header(OutHeader(OUT_HEADER_SIZE, NotifyCode.RESEND, 0)))

    def _mounts(self) -> list[MountEntry]:
        self._mount_list.seek(0)
        return mounts_on(self._where, os.fsdecode(self._mount_list.readall()))

    def _is_ours(self, entry: MountEntry) -> bool:
        return entry.kind == FS_TYPE and entry.device == self._device

    def _is_one_of_this_kind_there(self) -> bool:
        return any(entry.kind == FS_TYPE for entry in self._mounts()[-1:])

    def _take_away(self) -> None:
        if self._is_root:
            with contextlib.suppress(OSError):  # another process has unmounted it
                libc.detach_mount(self.path)
            return
        command = [_FUSERMOUNT, "-u", "-q", "-z", "--", os.fspath(self.path)]
        with contextlib.suppress(FileNotFoundError):  # fusermount3 has been uninstalled
            subprocess.run(command, check=False)

    def _check(self) -> None:
        mode = self._mode()
        while mode is None:
            self._remove_stale()
            mode = self._mode()
        if not stat.S_ISDIR(mode):
            raise MountError(f"mount point {self.path}: not a directory")

    def _mode(self) -> int | None:
        """Return the mode of the file at `path`; None if it is a mount whose server is gone."""
        try:
            return libc.mode_now(self.path)
        except OSError as exc:
            if exc.errno == errno.ENOTCONN:
                return None
            raise MountError(f"mount point {self.path}: {exc.strerror}") from exc

    def _remove_stale(self) -> None:
        entries = self._mounts()
        kind = entries[-1].kind if entries else "unknown"
        if kind != FS_TYPE:
            raise MountError(
                f"mount point {self.path}: a dead mount of type {kind}, only {FS_TYPE} is replaced"
            )
        _LOG.warning("%s: replacing a mount whose server is gone", self.path)
        self._take_away()
        if len(self._mounts()) >= len(entries):
            raise MountError(f"mount point {self.path}: the dead mount cannot be unmounted")

    def _mount(self, options: str) -> int:
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise MountError(f"{_DEVICE}: {exc.strerror}") from exc
        data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},{options}"
        flags = _mount_flags(is_noexec=self._flags.is_noexec)
        try:
            libc.mount(self._flags.source, self.path, FS_TYPE, flags, data)
        except OSError as exc:
            os.close(fd)
            raise MountError(f"mount point {self.path}: {exc.strerror}") from exc
        return fd

    def _fusermount(self, options: str) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs:
                options += ",noexec" * self._flags.is_noexec
                # Escaped as libfuse does, because a comma would begin another option.
                source = self._flags.source.replace("\\", "\\\\").replace(",", "\\,")
                command = [_FUSERMOUNT, "-o", f"ro,nosuid,nodev,{options},fsname={source}"]
                command[2] += f",subtype={FS_TYPE.removeprefix('fuse.')}"
                try:
                    done = subprocess.run(
                        [*command, "--", os.fspath(self.path)],
                        check=False,
                        env=os.environ | {_COMM_FD: str(theirs.fileno())},
                        pass_fds=[theirs.fileno()],
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                except FileNotFoundError as exc:
                    raise MountError(f"{_FUSERMOUNT} was not found; install fuse3") from exc
            if done.returncode != 0:
                reason = done.stderr.strip().removeprefix(f"{_FUSERMOUNT}: ")
                raise MountError(f"mount point {self.path}: {reason or _FUSERMOUNT + ' failed'}")
            _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
        if not fds:
            raise MountError(f"mount point {self.path}: {_FUSERMOUNT} sent no descriptor")
        os.set_inheritable(fds[0], False)  # noqa: FBT003 - the function's only form
        return fds[0]


def remount(path: Path, *, is_noexec: bool) -> None:
    """Change the one option of a mount in use that can be changed: noexec.

    Args:
        path: the mount point.
        is_noexec: whether programs cannot be executed from the mount.

    Raises:
        MountError: the kernel refused.
    """
    try:
        libc.remount(path, _mount_flags(is_noexec=is_noexec))
    except OSError as exc:
        raise MountError(f"mount point {path}: {exc.strerror}") from exc


def _mount_flags(*, is_noexec: bool) -> int:
    return libc.MS_RDONLY | libc.MS_NOSUID | libc.MS_NODEV | libc.MS_NOEXEC * is_noexec


def connection_of(fd: int) -> str:
    """Return the device number, as in mountinfo, of the mount that the /dev/fuse `fd` serves.

    The result is empty if `fd` is not open or the kernel does not report the number.
    """
    try:
        lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _colon, value = line.partition(":")
        if name == "fuse_connection":
            return f"0:{int(value)}"
    return ""


def mounts_on(place: str, mount_list: str) -> list[MountEntry]:
    """Return the mounts on one directory, from the lowest to the one on top.

    Args:
        place: the absolute path of the directory, without symlinks.
        mount_list: the text of /proc/self/mountinfo.
    """
    entries = []
    for line in filter(None, mount_list.split("\n")):
        fields = line.split(" ")
        where = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        if where == place:
            kind = fields[fields.index("-") + 1]
            entries.append(MountEntry(int(fields[0]), int(fields[1]), fields[2], kind))
    # The parent of each mount is the mount that it covers.
    below = {entry.parent_id: entry for entry in entries}
    ids = {entry.mount_id for entry in entries}
    found = [entry for entry in entries if entry.parent_id not in ids][-1:]
    while found and found[-1].mount_id in below:
        found.append(below[found[-1].mount_id])
    return found
