"""`appliance` commands that begin where an interpreter has imported what they need.

A crash test starts hundreds of them, and most of their time would go into the same imports. One
process does those, with no thread, event loop, channel or environment yet, and forks: what runs
then is the command, in a process of its own.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import appliance.importer.committer
import appliance.importer.importer
import appliance.importer.services_sink
import appliance.rpc.daemon  # noqa: F401 - commands would import these
from appliance.cli.main import main

DEADLINE_S = 60.0
_MESSAGE_MAX = 1 << 16


class Ended(NamedTuple):
    """How a command ended; its status is negative if it was killed."""

    status: int
    output: str
    errors: str


class PreparedCommands:
    """Starts commands."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.fakes.prepared_commands", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
            )
        self.channel.settimeout(DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.channel.close()
        self._process.wait(DEADLINE_S)

    def start(self, *arguments: str | Path, temp: Path) -> "Command":
        """Start `appliance` with `arguments`; temporary files go to `temp`."""
        return Command(self.channel, arguments, temp)

    def run(self, *arguments: str | Path, temp: Path) -> Ended:
        """Run `appliance` with `arguments` to its end."""
        return self.start(*arguments, temp=temp).wait()


class Command:
    """A command that was started; ended by `wait` or `kill`."""

    def __init__(self, channel: socket.socket, arguments: Sequence[str | Path], temp: Path) -> None:
        self._channel = channel
        request = json.dumps({"arguments": [*map(str, arguments)], "temp": str(temp)})
        self._output, output = os.pipe()
        self.errors, errors = os.pipe()
        socket.send_fds(channel, [request.encode()], [output, errors])
        os.close(output)
        os.close(errors)
        # The process is not waited for before `wait` asks for it: the pid stays its own.
        self.pid = json.loads(channel.recv(_MESSAGE_MAX))
        self._pidfd = os.pidfd_open(self.pid)

    def is_running(self, wait_s: float) -> bool:
        """Whether it still runs after so long."""
        ready, _, _ = select.select([self._pidfd], [], [], wait_s)
        return not ready

    def kill(self) -> Ended:
        """End it as the kernel would, whatever it does."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        return self.wait()

    def wait(self) -> Ended:
        """Wait for it and all its processes, which hold the ends of its pipes."""
        reader = _Reader(self._output)
        errors = _Reader(self.errors).result()
        output = reader.result()
        assert not self.is_running(DEADLINE_S), "it does not end"
        os.close(self._pidfd)
        self._channel.send(json.dumps({"reap": self.pid}).encode())
        return Ended(json.loads(self._channel.recv(_MESSAGE_MAX)), output, errors)


class _Reader:
    """Reads a pipe to its end, in a thread."""

    def __init__(self, fd: int) -> None:
        self._text = ""
        self._thread = threading.Thread(target=self._run, args=[fd])
        self._thread.start()

    def result(self) -> str:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "a process of a command does not end"
        return self._text

    def _run(self, fd: int) -> None:
        with os.fdopen(fd, errors="replace") as pipe:
            self._text = pipe.read()


def _serve(channel: socket.socket) -> None:
    assert threading.active_count() == 1
    gc.freeze()
    while True:
        data, fds, _, _ = socket.recv_fds(channel, _MESSAGE_MAX, 2)
        if not data:
            return
        request = json.loads(data)
        if "reap" in request:
            _, status = os.waitpid(request["reap"], 0)
            channel.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            channel.close()
            os.setsid()
            os.environ["TMPDIR"] = request["temp"]
            for number, fd in enumerate(fds, 1):
                os.dup2(fd, number)
                os.close(fd)
            main(request["arguments"])
            sys.exit(0)
        for fd in fds:
            os.close(fd)
        channel.send(json.dumps(pid).encode())


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _channel:
        _serve(_channel)
