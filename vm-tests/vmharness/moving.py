"""A guest that is saved, or moves from one QEMU to another, of a Debian whose QEMU can do that.

From 8.2 on, QEMU saves and moves guests with vhost-user-fs; Debian 12 has 7.2.
"""

import contextlib
import json
import os
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.fakes.running_command import every_event
from vmharness import qemu
from vmharness.cache import cached
from vmharness.debian_packages import command_of, unpack
from vmharness.guest import Guest
from vmharness.kernel import Kernel, qemu_kernel
from vmharness.served import NEW_SERIES

_SUITE: Final = os.environ.get("TEST_QEMU_SUITE", "sid")
_PACKAGES: Final = ("qemu-system-x86", "qemu-utils", "seabios")
_START_DEADLINE_S: Final = 60.0
_BOOT_DEADLINE_S: Final = 240.0
_MOVE_DEADLINE_S: Final = 300.0
_LIFETIME_S: Final = 7200.0
_CPUS: Final = 2
_MEMORY_MIB: Final = 256
_BYTES_PER_S: Final = 64 << 20


class MoveError(Exception):
    """QEMU refused to save or move a guest, or failed; the text is QEMU's."""


def newer_qemu() -> list[str]:
    """Return the command of a QEMU that moves guests, downloaded once."""
    root = _root()
    return [
        *("env", f"QEMU_MODULE_DIR={root}/usr/lib/x86_64-linux-gnu/qemu"),
        *command_of(root, "usr/bin/qemu-system-x86_64"),
        *("-L", f"{root}/usr/share/qemu", "-L", f"{root}/usr/share/seabios"),
    ]


def create_disk(path: Path) -> None:
    """Create a disk image that snapshots can be saved in."""
    subprocess.run(
        [*command_of(_root(), "usr/bin/qemu-img"), "create", "-q", "-f", "qcow2", path, "1G"],
        check=True,
        timeout=_START_DEADLINE_S,
    )


def _root() -> Path:
    return cached(f"qemu-{_SUITE}", lambda target: unpack(_SUITE, _PACKAGES, target, with_all=True))


class Qmp:
    """The monitor of one QEMU, which has just been started."""

    def __init__(self, path: Path, process: "subprocess.Popen[bytes]") -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(_MOVE_DEADLINE_S)
        for _ in every_event(_START_DEADLINE_S):
            with contextlib.suppress(ConnectionRefusedError, FileNotFoundError):
                self._sock.connect(os.fspath(path))
                break
            if process.poll() is not None:
                raise MoveError(f"QEMU ended with status {process.returncode}")
        self._stream = self._sock.makefile("r", encoding="utf-8")
        self._read()  # its greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> Any:
        """Return the answer to a command.

        Raises:
            MoveError: QEMU refuses it, or has ended.
        """
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        message = {"execute": command, "arguments": words}
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # seen when it is read
            self._sock.sendall(json.dumps(message).encode() + b"\n")
        while True:
            answer = self._read()
            if "error" in answer:
                raise MoveError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def close(self) -> None:
        self._stream.close()
        self._sock.close()

    def _read(self) -> dict[str, Any]:
        try:
            line = self._stream.readline()
        except ConnectionResetError:
            line = ""
        if not line:
            raise MoveError("QEMU has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class MovingGuest:
    """A guest with one file system that moves between back ends; ends with its `with` block.

    Args:
        device: its file system; the back end must be listening.
        directory: receives sockets and logs.
        disk: of `create_disk`, for `save` and `load`; None if there is none.
    """

    def __init__(self, device: qemu.FsDevice, directory: Path, disk: Path | None = None) -> None:
        self._directory = directory
        self._disk = disk
        # Its driver uses a request queue for each CPU.
        self._kernel: Kernel = qemu_kernel(NEW_SERIES)
        self._program = newer_qemu()
        self._num_processes = 0
        ours, theirs = socket.socketpair()
        # Each QEMU gets the same end. One that waits for its guest reads nothing from it.
        self._channel = theirs.dup()
        words = self._command(device, theirs.fileno())
        self.guest = Guest(words, (ours, theirs), qemu.console(directory), _LIFETIME_S)
        try:
            self.guest.wait_until_up(_BOOT_DEADLINE_S)
            self.qmp = Qmp(self._qmp_path, self.guest.process)
        except BaseException:
            self._channel.close()
            self.guest.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.qmp.close()
        self._channel.close()
        self.guest.close()

    def move_to(self, device: qemu.FsDevice) -> None:
        """Have another QEMU go on with the guest, with its file system at another back end.

        Raises:
            MoveError: one of them refuses. The guest goes on where it was.
        """
        channel = self._directory / f"move{self._num_processes}.sock"
        words = [*self._command(device, self._channel.fileno()), "-incoming", f"unix:{channel}"]
        with self.guest.console.open("ab") as log:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[self._channel.fileno()],
                start_new_session=True,
            )
        with contextlib.ExitStack() as started:
            started.callback(process.wait)
            started.callback(process.kill)
            target = Qmp(self._qmp_path, process)
            started.callback(target.close)
            # So slow that back ends write to many pages that were copied already.
            self.qmp.ask("migrate-set-parameters", max_bandwidth=_BYTES_PER_S)
            self.qmp.ask("migrate", uri=f"unix:{channel}")
            self._wait_for_migration()
            _wait_for_status(target, "running")
            started.pop_all()
        self._end_source()
        self.guest.moved_to(process, words)
        self.qmp = target

    def save(self, tag: str) -> None:
        """Save the machine under a name; it goes on."""
        self._do_job("snapshot-save", tag)

    def load(self, tag: str) -> None:
        """Put the machine back to where it was when it was saved, and let it go on."""
        self.qmp.ask("stop")
        self._do_job("snapshot-load", tag)
        self.qmp.ask("cont")

    @property
    def _qmp_path(self) -> Path:
        return self._directory / f"qmp{self._num_processes}.sock"

    def _command(self, device: qemu.FsDevice, channel_fd: int) -> list[str]:
        self._num_processes += 1
        words = qemu.command(
            "tcg",
            self._kernel,
            [device],
            self._directory,
            channel_fd,
            cpus=_CPUS,
            memory_mib=_MEMORY_MIB,
            program=self._program,
            # Or the guest itself would write to each page just before a back end reads into it, and
            # QEMU would copy it again in any case.
            kernel_words=["init_on_alloc=0"],
        )
        words += ["-qmp", f"unix:{self._qmp_path},server=on,wait=off"]
        if self._disk is not None:
            words += [
                "-blockdev",
                f"qcow2,node-name=disk,file.driver=file,file.filename={self._disk}",
            ]
        return words

    def _wait_for_migration(self) -> None:
        for _ in every_event(_MOVE_DEADLINE_S):
            state = self.qmp.ask("query-migrate")
            if state.get("status") == "completed":
                return
            if state.get("status") == "failed":
                raise MoveError(state.get("error-desc", "failed"))
        raise MoveError("the guest does not arrive")

    def _end_source(self) -> None:
        with contextlib.suppress(MoveError, OSError):
            self.qmp.ask("quit")
        self.qmp.close()

    def _do_job(self, command: str, tag: str) -> None:
        job = f"{command}-{tag}"
        self.qmp.ask(command, job_id=job, tag=tag, vmstate="disk", devices=["disk"])
        for _ in every_event(_MOVE_DEADLINE_S):
            (state,) = (one for one in self.qmp.ask("query-jobs") if one["id"] == job)
            if state["status"] == "concluded":
                self.qmp.ask("job-dismiss", id=job)
                if "error" in state:
                    raise MoveError(f"{command}: {state['error']}")
                return
        raise MoveError(f"{command} does not end")


def _wait_for_status(qmp: Qmp, status: str) -> None:
    for _ in every_event(_MOVE_DEADLINE_S):
        if qmp.ask("query-status")["status"] == status:
            return
    raise MoveError(f"the guest is not {status}")


def qemu_version(command: Sequence[str]) -> str:
    """Return what a QEMU calls itself."""
    done = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[0]
