"""QEMU's monitor: commands to a running machine, and its events."""

import contextlib
import json
import os
import socket
from pathlib import Path
from subprocess import Popen
from types import TracebackType
from typing import Any, Self

from tests.fakes.running_command import every_event


class MonitorError(Exception):
    """QEMU has refused a command, or has ended; the text is QEMU's."""


class Monitor:
    """A connection to the QMP socket of a machine (QEMU: docs/interop/qmp-spec).

    Args:
        path: the socket that the machine was started with.
        deadline_s: how long one answer or event may take, and the socket to appear.
        process: QEMU; when it ends, the socket is not waited for any more.

    Raises:
        MonitorError: QEMU has ended, or does not listen in time.
    """

    def __init__(self, path: Path, deadline_s: float, process: Popen[bytes] | None = None) -> None:
        self._events: list[dict[str, Any]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(deadline_s)
        for _ in every_event(deadline_s):
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                self._sock.connect(os.fspath(path))
                break
            if process is not None and process.poll() is not None:
                raise MonitorError(f"QEMU has ended with status {process.returncode}")
        else:
            raise MonitorError(f"QEMU does not listen on {path}")
        self._stream = self._sock.makefile("r", encoding="utf-8")
        self._receive()  # the greeting
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the machine runs on."""
        self._stream.close()
        self._sock.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command; return what it returns.

        Args:
            command: its name.
            arguments: with underscores in the place of hyphens.

        Raises:
            MonitorError: QEMU refuses it, or has ended.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = json.dumps({"execute": command, "arguments": words})
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen when it is read
            self._sock.sendall(request.encode() + b"\n")
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise MonitorError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_for(self, event: str, **data: object) -> None:
        """Return when an event came whose data include `data`; events before it are dropped."""
        while True:
            message = self._events.pop(0) if self._events else self._receive()
            if message.get("event") == event and data.items() <= message.get("data", {}).items():
                return

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except ConnectionResetError:
            line = ""
        if not line:
            raise MonitorError("QEMU has ended")
        message: dict[str, Any] = json.loads(line)
        return message
