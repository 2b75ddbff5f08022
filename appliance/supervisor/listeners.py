"""The sockets that front-ends connect to: made here or inherited."""

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from appliance.errors import ConfigError
from appliance.system.listening import claim_socket_path, set_socket_group, socket_mode

_SOCKET_MODE = 0o660


class Listener:
    """A listening AF_UNIX stream socket; `label` is what logs and `status` call it."""

    def __init__(self, sock: socket.socket, label: str, path: Path | None) -> None:
        sock.settimeout(0)
        self.sock = sock
        self.label = label
        self._path = path
        self._file = _identity(path) if path is not None else None

    @classmethod
    def bind(cls, path: Path, gid: int | None = None) -> "Listener":
        """Listen at `path`, for owner and group; a socket file that nobody listens on is replaced.

        Other threads must not make files meanwhile.

        Args:
            path: where the socket file is to be.
            gid: its group, if not this process's.

        Raises:
            ConfigError: the path is too long, in use, not a socket, or cannot be created; or the
                group cannot be given to it. No socket file is left behind.
        """
        try:
            claim_socket_path(path)
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            with socket_mode(_SOCKET_MODE):
                sock.bind(os.fspath(path))
            listener = cls(sock, str(path), path)
        except OSError as exc:
            raise ConfigError(f"socket path {path}: {exc.strerror}") from exc
        try:
            if gid is not None:
                set_socket_group(path, gid)
            sock.listen()
        except BaseException:
            listener.close()
            raise
        return listener

    @classmethod
    def inherit(cls, fd: int) -> "Listener":
        """Listen on the already listening socket `fd`, which is owned from now on.

        Raises:
            ConfigError: `fd` is not a listening AF_UNIX stream socket.
        """
        try:
            os.fstat(fd)  # says why a number is no descriptor
            sock = socket.socket(fileno=fd)
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as exc:
            raise ConfigError(f"--fd={fd}: {exc.strerror}") from exc
        except OverflowError as exc:
            raise ConfigError(f"--fd={fd}: {os.strerror(errno.EBADF)}") from exc
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM or not is_listening:
            raise ConfigError(f"--fd={fd}: not a listening AF_UNIX stream socket")
        os.set_inheritable(sock.fileno(), False)  # noqa: FBT003 - the function's only form
        return cls(sock, _name_of(sock) or f"fd:{fd}", None)

    def close(self) -> None:
        """Stop listening; the socket file is removed, unless the path is another one's by now."""
        self.sock.close()
        path, self._path = self._path, None
        if path is not None:
            with contextlib.suppress(FileNotFoundError):
                if _identity(path) == self._file:
                    path.unlink()


def listen(paths: Sequence[Path], fd: int | None, gid: int | None = None) -> list[Listener]:
    """Listen at each of `paths`, and on the inherited socket `fd` if there is one; all or none.

    The socket files get the group `gid`, if one is given.

    Raises:
        ConfigError: one of them cannot be listened on; no socket file is left behind.
    """
    with contextlib.ExitStack() as stack:
        listeners = [
            stack.enter_context(contextlib.closing(Listener.bind(path, gid))) for path in paths
        ]
        if fd is not None:
            listeners.append(Listener.inherit(fd))
        stack.pop_all()
    return listeners


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _name_of(sock: socket.socket) -> str:
    name = sock.getsockname()
    # Bytes, with a NUL first, are an abstract name (unix(7)).
    return "@" + os.fsdecode(name[1:]) if isinstance(name, bytes) else str(name)
