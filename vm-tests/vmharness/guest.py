"""One running guest and the shell jobs in it; the frames are those of guest/agent.c.

Three outcomes, never mixed: a job's Result, whatever its status; GuestLost, the guest has gone;
DeadlineExceeded, nothing was heard in time.
"""

import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

_HEADER: Final = struct.Struct("<III")  # type, job, payload size
_WORD: Final = struct.Struct("<I")
_START, _INPUT, _SIGNAL, _HELLO, _OUTPUT, _EXIT = 1, 2, 3, 16, 17, 18
_MAX_PAYLOAD: Final = 96 * 1024
_TAIL_BYTES: Final = 4096
_EXIT_DEADLINE_S: Final = 20.0


class GuestLost(Exception):  # noqa: N818 -- one of three outcomes, named as such
    """The guest ended before it answered; the text has its command, status and last words."""


class DeadlineExceeded(Exception):  # noqa: N818 -- one of three outcomes, named as such
    """A guest did not answer in time; the text has what it had said until then."""


class Result(NamedTuple):
    """How a job ended: the shell's status (128 + signal) and its stdout and stderr as written."""

    status: int
    output: bytes


class Job:
    """A script running in a guest; made by Guest.start()."""

    def __init__(self, guest: "Guest", number: int, script: str) -> None:
        self._guest = guest
        self._number = number
        self._script = script
        self.buffer = bytearray()
        self.status: int | None = None

    @property
    def output(self) -> bytes:
        """What the job has written so far."""
        return bytes(self.buffer)

    def wait(self, deadline_s: float) -> Result:
        """Return the result; a job that does not end in time is killed."""
        self._wait(lambda: self.status is not None, deadline_s)
        assert self.status is not None
        return Result(self.status, self.output)

    def wait_for_output(self, text: bytes, deadline_s: float) -> bytes:
        """Return the output so far once it contains `text`."""
        self._wait(lambda: text in self.buffer or self.status is not None, deadline_s)
        if text not in self.buffer:
            raise AssertionError(f"the job ended without writing {text!r}\n{self._tail()}")
        return self.output

    def send(self, data: bytes) -> None:
        """Write to the job's stdin; more than a pipe holds stalls the guest's agent."""
        for offset in range(0, len(data), _MAX_PAYLOAD):
            self._guest.send_frame(_INPUT, self._number, data[offset : offset + _MAX_PAYLOAD])

    def close_input(self) -> None:
        """Let the job read end-of-file on its stdin."""
        self._guest.send_frame(_INPUT, self._number, b"")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the job's shell and all it has started."""
        self._guest.send_frame(_SIGNAL, self._number, _WORD.pack(number))

    def _wait(self, is_over: Callable[[], bool], deadline_s: float) -> None:
        try:
            self._guest.wait(is_over, deadline_s)
        except DeadlineExceeded as exc:
            self.signal(signal.SIGKILL)
            raise DeadlineExceeded(f"{exc}\n{self._tail()}") from None
        except GuestLost as exc:
            raise GuestLost(f"{exc}\n{self._tail()}") from None

    def _tail(self) -> str:
        written = self.buffer[-_TAIL_BYTES:].decode(errors="backslashreplace")
        return f"--- script\n{self._script}\n--- its output ends with\n{written}"


class Guest:
    """A guest that runs scripts; ends with its `with` block and with this process.

    Args:
        command: starts the virtual machine. It runs in its own process group, with its stdout and
            stderr appended to `console`; `channel` is its end of the agent's channel, as fd
            `channel.fileno()`.
        channels: (our end, the guest's end) of a socket pair; owned from here on.
        console: the log file; the virtual machine itself may append to it, too.
        lifetime_s: no wait outlasts this many seconds from now, whatever its own deadline.
    """

    def __init__(
        self,
        command: Sequence[str],
        channels: tuple[socket.socket, socket.socket],
        console: Path,
        lifetime_s: float,
    ) -> None:
        self.command = list(command)
        self.console = console
        self._ends_at = time.monotonic() + lifetime_s
        self._channel, theirs = channels
        self._jobs: dict[int, Job] = {}
        self._numbers = itertools.count(1)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._is_up = False
        self._is_lost = False
        with theirs, console.open("ab") as log:
            self.process = subprocess.Popen(
                # the parent-death signal: a guest must not outlive a killed test run
                ["setpriv", "--pdeathsig", "KILL", "--", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_frames, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the virtual machine, at once and without ceremony."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(_EXIT_DEADLINE_S)
        self._reader.join(_EXIT_DEADLINE_S)
        self._channel.close()

    def moved_to(self, process: "subprocess.Popen[bytes]", command: Sequence[str]) -> None:
        """Take note that another process has gone on with the guest, on the same channel."""
        self.process.wait(_EXIT_DEADLINE_S)
        self.process, self.command = process, list(command)

    def wait_until_up(self, deadline_s: float) -> None:
        """Wait for the agent's first word; a guest that does not come up in time is ended."""
        try:
            self.wait(lambda: self._is_up, deadline_s)
        except (DeadlineExceeded, GuestLost):
            self.close()
            raise

    def run(self, script: str, deadline_s: float) -> Result:
        """Run a shell script to its end."""
        return self.start(script).wait(deadline_s)

    def check(self, script: str, deadline_s: float) -> bytes:
        """Run a shell script that must succeed; returns its output."""
        result = self.run(script, deadline_s)
        if result.status:
            written = result.output[-_TAIL_BYTES:].decode(errors="backslashreplace")
            raise AssertionError(f"status {result.status} from the guest's\n{script}\n{written}")
        return result.output

    def start(self, script: str) -> Job:
        """Start a shell script beside whatever else is running."""
        job = Job(self, next(self._numbers), script)
        with self._changed:
            self._jobs[job._number] = job
        self.send_frame(_START, job._number, script.encode())
        return job

    def wait_until_gone(self, deadline_s: float) -> int:
        """Wait for the virtual machine to end by itself; returns its exit status."""
        try:
            self.wait(lambda: False, deadline_s)
        except GuestLost:
            return self.process.wait(_EXIT_DEADLINE_S)
        raise AssertionError("unreachable: a wait for nothing ends with an error")

    def wait(self, is_over: Callable[[], bool], deadline_s: float) -> None:
        """Wait until a condition on what the agent has reported holds.

        Raises:
            GuestLost: the guest ended first.
            DeadlineExceeded: `deadline_s` or the guest's lifetime is over; the guest goes on.
        """
        began_at = time.monotonic()
        ends_at = min(began_at + deadline_s, self._ends_at)
        with self._changed:
            while not is_over():
                if self._is_lost:
                    raise GuestLost(self.describe("the guest is lost"))
                if not self._changed.wait(ends_at - time.monotonic()) and not is_over():
                    waited_s = ends_at - began_at
                    raise DeadlineExceeded(self.describe(f"no answer in {waited_s:.3g} s"))

    def describe(self, what: str) -> str:
        """Return `what` with the command, the exit status and the end of the console's log."""
        tail = self.console.read_bytes()[-_TAIL_BYTES:].decode(errors="backslashreplace")
        status = self.process.poll()
        state = "still running" if status is None else f"exit status {status}"
        command = " ".join(self.command)
        return f"{what} ({state})\n{command}\n--- {self.console} ends with\n{tail}"

    def send_frame(self, kind: int, job: int, payload: bytes) -> None:
        """Send one frame to the agent; a channel that has gone shows at the next wait."""
        if len(payload) > _MAX_PAYLOAD:
            raise ValueError(f"{len(payload)} bytes exceed the agent's limit of {_MAX_PAYLOAD}")
        with self._sending, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._channel.sendall(_HEADER.pack(kind, job, len(payload)) + payload)

    def _read_frames(self) -> None:
        with contextlib.suppress(EOFError, ConnectionResetError):
            while True:
                kind, number, size = _HEADER.unpack(self._read(_HEADER.size))
                payload = self._read(size)
                with self._changed:
                    self._take_frame(kind, number, payload)
                    self._changed.notify_all()
        # at the end of the channel nobody is left to talk to, even if the machine still runs
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_DEADLINE_S)
        with self._changed:
            self._is_lost = True
            self._changed.notify_all()

    def _take_frame(self, kind: int, number: int, payload: bytes) -> None:
        match kind:
            case _ if kind == _HELLO:
                self._is_up = True
            case _ if kind == _OUTPUT:
                self._jobs[number].buffer += payload
            case _ if kind == _EXIT:
                (self._jobs.pop(number).status,) = _WORD.unpack(payload)
            case _:
                raise AssertionError(f"frame type {kind} from the agent")

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._channel.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)
