"""Where a mount goes: the checks, mount(2) or fusermount3, and the descriptors of the device."""

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import socket
import stat
import subprocess
from pathlib import Path
from typing import Final

from appliance.errors import MountError
from appliance.fuse_proto._wire import (
    OUT_HEADER_SIZE,
    NotifyCode,
    OutHeader,
    pack_out_header,
)

_LOG = logging.getLogger(__name__)

FS_TYPE: Final = "fuse.appliance"
_SOURCE: Final = "appliance"
_DEVICE: Final = "/dev/fuse"
# linux/mount.h, linux/fs.h
_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MNT_DETACH: Final = 2
# linux/fuse.h: FUSE_DEV_IOC_CLONE, _IOR(229, 0, uint32_t)
_IOC_CLONE: Final = 0x8004E500
_READ_AHEAD_KIB: Final = 1024
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
_FUSERMOUNT: Final = "fusermount3"
# fusermount3.c: the environment variable that names the socket the descriptor is sent over
_COMM_FD: Final = "_FUSE_COMMFD"


class Mountpoint:
    """A directory to mount on; owns the first descriptor of the mount once there is one."""

    def __init__(self, path: Path, *, allows_other: bool) -> None:
        """Check `path`; a mount of ours that lost its server is taken away first.

        Raises:
            MountError: it is not there, not a directory, or a dead mount of another program.
        """
        self.path = path
        self.fd = -1
        self._allows_other = allows_other
        self._is_root = os.geteuid() == 0
        self._check()

    def mount(self) -> None:
        """Mount; the kernel then waits for INIT to be answered on `fd` or a clone of it.

        Raises:
            MountError: the kernel or fusermount3 refused.
        """
        options = "default_permissions" + ",allow_other" * self._allows_other
        self.fd = self._mount(options) if self._is_root else self._fusermount(options)

    def probe(self) -> None:
        """Return when the mount answers; large files are then read ahead by the whole reply.

        Raises:
            OSError: the mount is gone.
        """
        device = self.path.stat().st_dev
        if not self._is_root:
            return
        # INIT can only lower what the kernel has as its default.
        bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
        try:
            bdi.write_text(str(_READ_AHEAD_KIB))
        except OSError as exc:
            _LOG.info("%s: %s; large files are read in smaller pieces", bdi, exc.strerror)

    def unmount(self) -> None:
        """Take the mount away; whoever uses it still keeps it until the descriptors are closed."""
        if self._is_root:
            with contextlib.suppress(OSError):  # somebody was faster
                _detach(self.path)
            return
        command = [_FUSERMOUNT, "-u", "-q", "-z", "--", os.fspath(self.path)]
        with contextlib.suppress(FileNotFoundError):  # it was there when it mounted, if it did
            subprocess.run(command, check=False)

    def close(self) -> None:
        """Close the descriptor; with its last clone the mount is dead."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def clone(self) -> int:
        """Return a new descriptor of the mount, with requests in progress of its own."""
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _IOC_CLONE, self.fd.to_bytes(4, "little"))
        except OSError:
            os.close(fd)
            raise
        return fd

    def resend(self) -> None:
        """Have the kernel queue again whatever was read from any clone and not answered."""
        # Living workers meet ENOENT for those of theirs: another one answers.
        os.write(self.fd, pack_out_header(OutHeader(OUT_HEADER_SIZE, NotifyCode.RESEND, 0)))

    def _check(self) -> None:
        mode = self._mode()
        while mode is None:
            self._remove_stale()
            mode = self._mode()
        if not stat.S_ISDIR(mode):
            raise MountError(f"mount point {self.path}: not a directory")

    def _mode(self) -> int | None:
        """Return the mode of what is there; None if it is a mount whose server is gone."""
        try:
            return self.path.stat().st_mode
        except OSError as exc:
            if exc.errno == errno.ENOTCONN:
                return None
            raise MountError(f"mount point {self.path}: {exc.strerror}") from exc

    def _remove_stale(self) -> None:
        kinds = _types_of_mounts(self.path)
        if not kinds or kinds[-1] != FS_TYPE:
            kind = kinds[-1] if kinds else "unknown"
            raise MountError(f"mount point {self.path}: a dead mount of type {kind}, not ours")
        _LOG.warning("%s: replacing a mount whose server is gone", self.path)
        self.unmount()
        if len(_types_of_mounts(self.path)) >= len(kinds):
            raise MountError(f"mount point {self.path}: its dead mount cannot be taken away")

    def _mount(self, options: str) -> int:
        try:
            fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise MountError(f"{_DEVICE}: {exc.strerror}") from exc
        data = f"fd={fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},{options}"
        flags = _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        libc = ctypes.CDLL(None, use_errno=True)
        path = os.fsencode(self.path)
        if libc.mount(_SOURCE.encode(), path, FS_TYPE.encode(), flags, data.encode()) != 0:
            code = ctypes.get_errno()
            os.close(fd)
            raise MountError(f"mount point {self.path}: {os.strerror(code)}")
        return fd

    def _fusermount(self, options: str) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours:
            with theirs:
                command = [_FUSERMOUNT, "-o", f"ro,nosuid,nodev,fsname={_SOURCE},{options}"]
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
                    raise MountError(f"{_FUSERMOUNT} is not there; install fuse3") from exc
            if done.returncode != 0:
                reason = done.stderr.strip().removeprefix(f"{_FUSERMOUNT}: ")
                raise MountError(f"mount point {self.path}: {reason or _FUSERMOUNT + ' failed'}")
            _data, fds, _flags, _address = socket.recv_fds(ours, 1, 1)
        if not fds:
            raise MountError(f"mount point {self.path}: {_FUSERMOUNT} sent no descriptor")
        os.set_inheritable(fds[0], False)  # noqa: FBT003 - the function's only form
        return fds[0]


def _detach(path: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(path))


def _types_of_mounts(path: Path) -> list[str]:
    """Return the types of the mounts on `path`, the one on top last."""
    wanted = os.path.realpath(path)
    kinds = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).splitlines():
        fields = line.split(" ")
        where = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        if where == wanted:
            kinds.append(fields[fields.index("-") + 1])
    return kinds
