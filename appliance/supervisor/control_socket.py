"""How `appliance attach` and `appliance detach` talk to the supervisor of a state directory.

The socket is `STATE_DIR/control`, for the owner of the supervisor alone. A client sends one line of
JSON, `{"version": 1, "attach": {...}}` or `{"version": 1, "detach": NAME}`, and gets one line back:
`{"socket": PATH}`, or `{"error": TEXT}` if nothing was changed.
"""

import asyncio
import contextlib
import json
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from appliance.bounds import CONTROL_REQUEST_MAX
from appliance.errors import ApplianceError, ConfigError, StoreError
from appliance.system.listening import claim_socket_path, make_private, short_socket_path

_VERSION: Final = 1
# How long a client may take to send its request.
_REQUEST_DEADLINE_S: Final = 5.0
# How long the supervisor may take to answer: it may have to end a session.
_ANSWER_DEADLINE_S: Final = 60.0

Handler = Callable[[Mapping[str, Any]], Awaitable[dict[str, object]]]


class ControlSocket:
    """Passes requests on to a handler, which returns the answer or raises ApplianceError."""

    def __init__(self, state_dir: Path, handle: Handler) -> None:
        self._path = _path(state_dir)
        self._handle = handle
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; the state directory is created if it is missing.

        Raises:
            ConfigError: another supervisor listens there.
            StoreError: the socket cannot be created.
        """
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            sock = self._bound()
        except OSError as exc:
            raise StoreError(f"{self._path}: {exc.strerror}") from exc
        self._server = await asyncio.start_unix_server(
            self._serve, sock=sock, limit=CONTROL_REQUEST_MAX
        )

    def _bound(self) -> socket.socket:
        with short_socket_path(self._path) as address:
            try:
                claim_socket_path(Path(address))
            except ConfigError as exc:
                raise ConfigError(
                    f"{self._path}: a supervisor with --listen-dir runs on this state directory"
                ) from exc
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            make_private(sock)
            sock.bind(address)
        return sock

    async def close(self) -> None:
        """Stop listening and remove the socket file."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(OSError):
                self._path.unlink()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer_to(reader)
            with contextlib.suppress(ConnectionError):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        finally:
            writer.close()

    async def _answer_to(self, reader: asyncio.StreamReader) -> dict[str, object]:
        try:
            async with asyncio.timeout(_REQUEST_DEADLINE_S):
                request = json.loads(await reader.readline())
            if not isinstance(request, dict) or request.get("version") != _VERSION:
                return {"error": f"this release understands requests of version {_VERSION}"}
            return await self._handle(request)
        except TimeoutError:
            return {"error": f"no request came within {_REQUEST_DEADLINE_S:.0f} s"}
        except (ValueError, KeyError, TypeError) as exc:
            return {"error": f"not a request: {exc}"}
        except ApplianceError as exc:
            return {"error": str(exc)}


def ask_supervisor(state_dir: Path, request: Mapping[str, object]) -> dict[str, Any]:
    """Send a request to the supervisor of `state_dir` and return its answer.

    Raises:
        StoreError: there is none, this user may not connect to it, or it refused; nothing was
            changed unless it ended before its answer.
    """
    path = _path(state_dir)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(_ANSWER_DEADLINE_S)
        try:
            with short_socket_path(path) as address:
                sock.connect(address)
            sock.sendall(json.dumps({"version": _VERSION, **request}).encode() + b"\n")
            with sock.makefile("rb") as stream:
                answer: dict[str, Any] = json.loads(stream.readline())
        except (FileNotFoundError, ConnectionRefusedError) as exc:
            raise StoreError(
                f"no `appliance virtiofs --listen-dir` is running on {state_dir}"
            ) from exc
        except OSError as exc:
            raise StoreError(f"the supervisor at {path}: {exc.strerror or exc}") from exc
        except ValueError as exc:
            raise StoreError(f"the supervisor at {path}: it ended before its answer") from exc
    if "error" in answer:
        raise StoreError(str(answer["error"]))
    return answer


def _path(state_dir: Path) -> Path:
    return state_dir / "control"
