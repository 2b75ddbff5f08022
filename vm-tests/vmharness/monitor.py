"""QEMU's monitor: commands to a running machine, and its events."""

import json
import os
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class Monitor:
    """A connection to the QMP socket of a machine (QEMU: docs/interop/qmp-spec).

    Args:
        path: the socket that the machine was started with.
        deadline_s: how long one answer or event may take.
    """

    def __init__(self, path: Path, deadline_s: float) -> None:
        self._events: list[dict[str, Any]] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(deadline_s)
        self._sock.connect(os.fspath(path))
        self._stream = self._sock.makefile("rw")
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
        self._stream.close()
        self._sock.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command; return what it returns."""
        request = {"execute": command, "arguments": arguments}
        self._stream.write(json.dumps(request) + "\n")
        self._stream.flush()
        while True:
            message = self._receive()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise AssertionError(f"{request}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_for(self, event: str, **data: object) -> None:
        """Return when an event came whose data include `data`; events before it are dropped."""
        while True:
            message = self._events.pop(0) if self._events else self._receive()
            if message.get("event") == event and data.items() <= message.get("data", {}).items():
                return

    def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._stream.readline())
        return message
