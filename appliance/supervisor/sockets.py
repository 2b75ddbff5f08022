"""The sockets that front-ends connect to: made here or inherited."""

import contextlib
import os
import socket
from pathlib import Path

from appliance.errors import ConfigError
from appliance.sockets import claim_socket_path

_SOCKET_MODE = 0o660


class Listener:
    """A listening AF_UNIX stream socket; `label` is what logs and `status` call it."""

    def __init__(self, sock: socket.socket, label: str, path: Path | None) -> None:
        sock.settimeout(0)
        self.sock = sock
        self.label = label
        self._path = path

    @classmethod
    def bind(cls, path: Path) -> "Listener":
        """Listen at `path`; a socket file that nobody listens on is replaced.

        Raises:
            ConfigError: the path is too long, in use, not a socket, or cannot be created.
        """
        try:
            claim_socket_path(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.bind(os.fspath(path))
            path.chmod(_SOCKET_MODE)
            sock.listen()
        except OSError as exc:
            raise ConfigError(f"socket path {path}: {exc.strerror}") from exc
        return cls(sock, str(path), path)

    @classmethod
    def inherit(cls, fd: int) -> "Listener":
        """Listen on the already listening socket `fd`, which is owned from now on.

        Raises:
            ConfigError: `fd` is not a listening AF_UNIX stream socket.
        """
        try:
            sock = socket.socket(fileno=fd)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as exc:
            raise ConfigError(f"--fd={fd}: {exc.strerror}") from exc
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not is_listening:
            raise ConfigError(f"--fd={fd}: not a listening AF_UNIX stream socket")
        os.set_inheritable(sock.fileno(), False)  # noqa: FBT003 - the function's only form
        return cls(sock, sock.getsockname() or f"fd:{fd}", None)

    def close(self) -> None:
        """Stop listening; a socket file of our own is removed."""
        self.sock.close()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()
