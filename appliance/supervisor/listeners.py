"""The sockets that front-ends connect to, bound here or inherited, and accepting on them."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError
from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import WHOLE_STORE, Exported
from appliance.system.listening import (
    claim_socket_path,
    make_private,
    set_socket_group,
    set_socket_permissions,
)

_LOG = logging.getLogger(__name__)

SOCKET_MODE: Final = 0o660
# How long to wait before retrying after accept(2) has failed.
_ACCEPT_AGAIN_S: Final = 1.0


class Listener:
    """A listening AF_UNIX stream socket. Owns the socket, and the socket file that it created.

    `label` names the socket in logs and in `appliance status`; `exported` is what front-ends that
    connect to it see.
    """

    def __init__(
        self,
        sock: socket.socket,
        label: str,
        path: Path | None,
        exported: Exported = WHOLE_STORE,
    ) -> None:
        sock.settimeout(0)
        self.sock = sock
        self.label = label
        self.exported = exported
        self._path = path
        self._file = _identity(path) if path is not None else None

    @classmethod
    def bind(
        cls,
        path: Path,
        gid: int | None = None,
        *,
        mode: int = SOCKET_MODE,
        exported: Exported = WHOLE_STORE,
    ) -> "Listener":
        """Listen at `path`.

        A socket file that has no listener is replaced.

        Args:
            path: where to create the socket file.
            gid: the group of the socket file; None leaves it to the kernel.
            mode: the permissions of the socket file; by default, of owner and group.
            exported: what front-ends see.

        Raises:
            ConfigError: the path is too long, in use, not a socket, or cannot be created; or the
                socket file cannot be given to the group. No socket file is left behind.
        """
        try:
            claim_socket_path(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            make_private(sock)
            sock.bind(os.fspath(path))
            listener = cls(sock, str(path), path, exported)
        except OSError as exc:
            raise ConfigError(f"socket path {path}: {exc.strerror}") from exc
        try:
            if gid is not None:
                set_socket_group(path, gid)
            set_socket_permissions(path, mode)
            sock.listen()
        except BaseException:
            listener.close()
            raise
        return listener

    @classmethod
    def inherit(cls, fd: int, exported: Exported = WHOLE_STORE) -> "Listener":
        """Take ownership of `fd`, an inherited socket that already listens.

        Raises:
            ConfigError: `fd` is not a listening AF_UNIX stream socket.
        """
        try:
            os.fstat(fd)  # its error says why the number is not a descriptor
            sock = socket.socket(fileno=fd)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as exc:
            raise ConfigError(f"--fd={fd}: {exc.strerror}") from exc
        except OverflowError as exc:
            raise ConfigError(f"--fd={fd}: {os.strerror(errno.EBADF)}") from exc
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not is_listening:
            raise ConfigError(f"--fd={fd}: not a listening AF_UNIX stream socket")
        os.set_inheritable(sock.fileno(), False)  # noqa: FBT003 - the function's only form
        return cls(sock, _name_of(sock) or f"fd:{fd}", None, exported)

    @property
    def place(self) -> pb.Place:
        """What a session is recorded with, and taken over by."""
        return pb.Place(
            label=self.label, view=self.exported.view or "", root=self.exported.root or ""
        )

    async def accept(self) -> socket.socket:
        """Return the next connection; the caller owns it.

        An error of accept(2) either concerns a single connection or is temporary: there may be no
        free descriptor at the moment. It is logged, and accepting is tried again after a second.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _address = await loop.sock_accept(self.sock)
            except OSError as exc:
                _LOG.error("%s: cannot accept a front-end now: %s", self.label, exc.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
            else:
                return sock

    def close(self) -> None:
        """Stop listening and remove the socket file, unless another file has taken its place."""
        self.sock.close()
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                if _identity(path) == self._file:
                    path.unlink()


def listen(
    places: Sequence[tuple[Path, Exported]],
    fd: int | None,
    fd_exported: Exported = WHOLE_STORE,
    *,
    gid: int | None = None,
    mode: int = SOCKET_MODE,
) -> list[Listener]:
    """Listen on all the given sockets, or on none if one of them fails.

    Args:
        places: where to create socket files, and what front-ends see that connect to each.
        fd: an inherited listening socket, of which the result takes ownership; or None.
        fd_exported: what front-ends see that connect to the inherited socket.
        gid: the group of the socket files; None leaves it to the kernel.
        mode: the permissions of the socket files.

    Raises:
        ConfigError: one of the sockets cannot be used. No socket file is left behind.
    """
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(
                contextlib.closing(Listener.bind(path, gid, mode=mode, exported=exported))
            )
            for path, exported in places
        ]
        if fd is not None:
            listeners.append(Listener.inherit(fd, fd_exported))
        stack.pop_all()
    return listeners


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _name_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    # An abstract name is returned as bytes that begin with a NUL (unix(7)).
    return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)
