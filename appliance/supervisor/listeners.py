"""The sockets that front-ends connect to, bound here or inherited, and accepting on them."""

import asyncio
import errno
import logging
import os
import socket
from pathlib import Path
from typing import Final, NamedTuple

from appliance.errors import ConfigError
from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import WHOLE_STORE, Exported
from appliance.supervisor.profiling import NO_PROFILING, Profiling
from appliance.system.bound_socket import BoundSocket
from appliance.vhost.fs_device import DeviceProperties

_LOG = logging.getLogger(__name__)

SOCKET_MODE: Final = 0o660
# How long to wait before retrying after accept(2) has failed.
_ACCEPT_AGAIN_S: Final = 1.0


class SocketTerms(NamedTuple):
    """What holds for one socket, in place of what the supervisor offers elsewhere.

    Args:
        properties: those of the device.
        max_front_ends: the number of front-ends that are served at a time; None as elsewhere.
    """

    properties: DeviceProperties
    max_front_ends: int | None


class Listener:
    """A listening AF_UNIX stream socket. Owns the socket, and the socket file that it created.

    `label` names the socket in logs and in `appliance status`; `exported` is what front-ends that
    connect to it see; `terms` is what holds for this socket alone, if anything does; `profiling`
    is which profiles its sessions have.
    """

    def __init__(
        self,
        sock: socket.socket,
        label: str,
        exported: Exported = WHOLE_STORE,
        bound: BoundSocket | None = None,
        terms: SocketTerms | None = None,
        profiling: Profiling = NO_PROFILING,
    ) -> None:
        sock.settimeout(0)
        self.sock = sock
        self.label = label
        self.exported = exported
        self.terms = terms
        self.profiling = profiling
        self._bound = bound

    @classmethod
    def of(
        cls,
        bound: BoundSocket,
        exported: Exported = WHOLE_STORE,
        terms: SocketTerms | None = None,
        profiling: Profiling = NO_PROFILING,
    ) -> "Listener":
        """Take ownership of a socket that listens already, with its file."""
        return cls(bound.sock, str(bound.path), exported, bound, terms, profiling)

    @classmethod
    def bind(
        cls,
        path: Path,
        gid: int | None = None,
        *,
        mode: int = SOCKET_MODE,
        exported: Exported = WHOLE_STORE,
        profiling: Profiling = NO_PROFILING,
    ) -> "Listener":
        """Listen at `path`; see `BoundSocket`. By default, owner and group may connect.

        Raises:
            ConfigError: the socket cannot be had. No socket file is left behind.
        """
        return cls.of(BoundSocket(path, gid, mode=mode), exported, profiling=profiling)

    @classmethod
    def inherit(
        cls, fd: int, exported: Exported = WHOLE_STORE, profiling: Profiling = NO_PROFILING
    ) -> "Listener":
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
        return cls(sock, _name_of(sock) or f"fd:{fd}", exported, profiling=profiling)

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
        if self._bound is not None:
            self._bound.close()
        self.sock.close()


def _name_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    # An abstract name is returned as bytes that begin with a NUL (unix(7)).
    return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)
