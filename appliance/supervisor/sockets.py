"""The sockets that front-ends connect to: made here or inherited; and sd_notify."""

import contextlib
import os
import socket
import stat
from pathlib import Path

from appliance.errors import ConfigError

# sockaddr_un.sun_path, less the terminating NUL (unix(7)).
_SUN_PATH_BYTES = 107
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
        if len(os.fsencode(path)) > _SUN_PATH_BYTES:
            raise ConfigError(f"socket path {path}: longer than {_SUN_PATH_BYTES} bytes")
        try:
            _remove_stale(path)
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


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket path {path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"socket path {path}: another process listens there")


def notify(state: str) -> None:
    """Tell the service manager `state`, e.g. "READY=1"; without one, do nothing.

    Source: sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A manager that does not listen any more is no reason to fail.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        sock.connect(address)
        sock.send(state.encode())
