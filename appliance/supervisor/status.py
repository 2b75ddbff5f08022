"""`appliance status`: every running supervisor answers on a socket in the state directory.

The socket is `STATE_DIR/supervisors/PID`. A connection gets one JSON document and the end of the
stream.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from appliance.errors import StoreError

_ANSWER_DEADLINE_S = 5.0
_UNREADY = ".new"
_SOCKET_MODE = 0o600


class StatusServer:
    """Serves `report()` to whoever connects."""

    def __init__(self, state_dir: Path, report: Callable[[], dict[str, Any]]) -> None:
        self._path = _directory(state_dir) / str(os.getpid())
        self._report = report
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen, in a directory made if missing.

        Raises:
            StoreError: the state directory does not take the socket.
        """
        try:
            sock = self._listen()
        except OSError as exc:
            raise StoreError(f"{self._path}: {exc.strerror}") from exc
        self._server = await asyncio.start_unix_server(self._answer, sock=sock)

    def _listen(self) -> socket.socket:
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Renamed into place when it listens: a socket that refuses is taken for a dead one's.
        unready = self._path.with_suffix(_UNREADY)
        unready.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Linux makes the file with the mode that the socket has (unix_bind_bsd in net/unix), so no
        # thread has to do without its umask, and no chmod can meet another file.
        os.fchmod(sock.fileno(), _SOCKET_MODE)
        with _short_path(unready) as address:
            sock.bind(address)
        sock.listen()
        unready.rename(self._path)
        return sock

    async def close(self) -> None:
        """Stop listening and remove the socket file."""
        if self._server is not None:
            self._server.close()
        # The directory may be gone, or read-only by now; the next `status` removes what stays.
        with contextlib.suppress(OSError):
            self._path.unlink()

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(self._report()).encode())
            await writer.drain()
        writer.close()


def collect(state_dir: Path) -> list[dict[str, Any]]:
    """Return the reports of all supervisors that run on `state_dir`; sockets of dead ones go.

    Raises:
        StoreError: a supervisor is there and does not answer, or may not be asked.
    """
    reports = []
    directory = _directory(state_dir)
    for path in sorted(directory.glob("*[0-9]")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER_DEADLINE_S)
            try:
                with _short_path(path) as address:
                    sock.connect(address)
                with sock.makefile("rb") as stream:
                    reports.append(json.load(stream))
            except (ConnectionRefusedError, FileNotFoundError):
                with contextlib.suppress(OSError):
                    path.unlink()
                continue
            except OSError as exc:
                raise StoreError(f"supervisor {path.name} at {path}: {exc}") from exc
            except ValueError as exc:
                raise StoreError(
                    f"supervisor {path.name} at {path}: it ended within its answer"
                ) from exc
    return reports


def _directory(state_dir: Path) -> Path:
    return state_dir / "supervisors"


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    # A state directory may lie deeper than the 107 bytes that a socket address holds.
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
