"""A socket of a server with its file, made before anything else of the server is imported."""

import contextlib
import os
import socket
from pathlib import Path

from appliance.errors import ConfigError
from appliance.system.listening import (
    claim_socket_path,
    make_private,
    set_socket_group,
    set_socket_permissions,
)


class BoundSocket:
    """A listening AF_UNIX stream socket and the socket file that was made for it; owns both."""

    def __init__(self, path: Path, gid: int | None, *, mode: int) -> None:
        """Listen at `path`. A socket file that has no listener is replaced.

        Args:
            path: where to create the socket file.
            gid: the group of the socket file; None leaves it to the kernel.
            mode: the permissions of the socket file.

        Raises:
            ConfigError: the path is too long, in use, not a socket, or cannot be created; or the
                socket file cannot be given to the group. No socket file is left behind.
        """
        self.path = path
        try:
            claim_socket_path(path)
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            make_private(self.sock)
            self.sock.bind(os.fspath(path))
            self._file = _identity(path)
        except OSError as exc:
            raise ConfigError(f"socket path {path}: {exc.strerror}") from exc
        try:
            if gid is not None:
                set_socket_group(path, gid)
            set_socket_permissions(path, mode)
            self.sock.listen()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop listening and remove the socket file, unless another file has taken its place."""
        if self.sock.fileno() < 0:
            return
        self.sock.close()
        with contextlib.suppress(FileNotFoundError):
            if _identity(self.path) == self._file:
                self.path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
