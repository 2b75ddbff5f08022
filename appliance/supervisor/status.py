"""`appliance status`: every running supervisor answers on a socket in the state directory.

The socket is `STATE_DIR/supervisors/PID`. The supervisor sends one JSON document over each
connection and closes it.
"""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from appliance.errors import StoreError
from appliance.system.listening import short_socket_path

_ANSWER_DEADLINE_S = 5.0
_UNREADY = ".new"
_SOCKET_MODE = 0o600


class StatusServer:
    """Sends the result of `report()` to every client that connects."""

    def __init__(self, state_dir: Path, report: Callable[[], Awaitable[dict[str, Any]]]) -> None:
        self._path = _directory(state_dir) / str(os.getpid())
        self._report = report
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; the directory is created if it is missing.

        Raises:
            StoreError: the socket cannot be created in the state directory.
        """
        try:
            sock = self._listen()
        except OSError as exc:
            raise StoreError(f"{self._path}: {exc.strerror}") from exc
        self._server = await asyncio.start_unix_server(self._answer, sock=sock)

    def _listen(self) -> socket.socket:
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Bound under another name and renamed once it listens, because `collect` removes a socket
        # that refuses connections as one of a dead supervisor.
        unready = self._path.with_suffix(_UNREADY)
        unready.unlink(missing_ok=True)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Linux creates the socket file with the mode of the socket (unix_bind_bsd in net/unix).
        # Unlike umask, this affects no other thread, and unlike chmod, no other file.
        os.fchmod(sock.fileno(), _SOCKET_MODE)
        with short_socket_path(unready) as address:
            sock.bind(address)
        sock.listen()
        unready.rename(self._path)
        return sock

    async def close(self) -> None:
        """Stop listening and remove the socket file."""
        if self._server is not None:
            self._server.close()
        # The directory may be gone or read-only by now. If the file stays, `collect` removes it.
        with contextlib.suppress(OSError):
            self._path.unlink()

    async def _answer(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(json.dumps(await self._report()).encode())
            await writer.drain()
        writer.close()


def collect(state_dir: Path) -> list[dict[str, Any]]:
    """Return the reports of all supervisors that use `state_dir`; remove sockets of dead ones.

    Raises:
        StoreError: a supervisor does not answer, or this user may not connect to it.
    """
    reports = []
    directory = _directory(state_dir)
    for path in sorted(directory.glob("*[0-9]")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_ANSWER_DEADLINE_S)
            try:
                with short_socket_path(path) as address:
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
                    f"supervisor {path.name} at {path}: it ended before its answer was complete"
                ) from exc
    return reports


def _directory(state_dir: Path) -> Path:
    return state_dir / "supervisors"
