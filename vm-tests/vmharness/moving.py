"""A guest that is saved, or moves from one QEMU to another, of a Debian whose QEMU can do that."""

import contextlib
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.fakes.running_command import every_event
from vmharness import newer_debian, qemu
from vmharness.guest import Guest
from vmharness.kernel import Kernel, qemu_kernel
from vmharness.monitor import Monitor, MonitorError
from vmharness.served import NEW_SERIES

_BOOT_DEADLINE_S: Final = 240.0
_MOVE_DEADLINE_S: Final = 300.0
_LIFETIME_S: Final = 7200.0
_CPUS: Final = 2
_MEMORY_MIB: Final = 256
_BYTES_PER_S: Final = 64 << 20


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
        self._program = newer_debian.qemu()
        self._num_processes = 0
        ours, theirs = socket.socketpair()
        # Each QEMU gets the same end. One that waits for its guest reads nothing from it.
        self._channel = theirs.dup()
        words = self._command(device, theirs.fileno())
        self.guest = Guest(words, (ours, theirs), qemu.console(directory), _LIFETIME_S)
        try:
            self.guest.wait_until_up(_BOOT_DEADLINE_S)
            self.monitor = Monitor(self._monitor_path, _MOVE_DEADLINE_S, self.guest.process)
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
        self.monitor.close()
        self._channel.close()
        self.guest.close()

    def move_to(self, device: qemu.FsDevice) -> None:
        """Have another QEMU go on with the guest, with its file system at another back end.

        Raises:
            MonitorError: one of them refuses. The guest goes on where it was.
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
            target = Monitor(self._monitor_path, _MOVE_DEADLINE_S, process)
            started.callback(target.close)
            # So slow that back ends write to many pages that were copied already.
            self.monitor.execute("migrate-set-parameters", max_bandwidth=_BYTES_PER_S)
            self.monitor.execute("migrate", uri=f"unix:{channel}")
            self._wait_for_migration()
            _wait_for_status(target, "running")
            started.pop_all()
        self._end_source()
        self.guest.moved_to(process, words)
        self.monitor = target

    def save(self, tag: str) -> None:
        """Save the machine under a name; it goes on."""
        self._do_job("snapshot-save", tag)

    def load(self, tag: str) -> None:
        """Put the machine back to where it was when it was saved, and let it go on."""
        self.monitor.execute("stop")
        self._do_job("snapshot-load", tag)
        self.monitor.execute("cont")

    @property
    def _monitor_path(self) -> Path:
        return self._directory / f"monitor{self._num_processes}.sock"

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
        words += ["-qmp", f"unix:{self._monitor_path},server=on,wait=off"]
        if self._disk is not None:
            words += [
                "-blockdev",
                f"qcow2,node-name=disk,file.driver=file,file.filename={self._disk}",
            ]
        return words

    def _wait_for_migration(self) -> None:
        for _ in every_event(_MOVE_DEADLINE_S):
            state = self.monitor.execute("query-migrate")
            if state.get("status") == "completed":
                return
            if state.get("status") == "failed":
                raise MonitorError(state.get("error-desc", "failed"))
        raise MonitorError("the guest does not arrive")

    def _end_source(self) -> None:
        with contextlib.suppress(MonitorError, OSError):
            self.monitor.execute("quit")
        self.monitor.close()

    def _do_job(self, command: str, tag: str) -> None:
        job = f"{command}-{tag}"
        self.monitor.execute(command, job_id=job, tag=tag, vmstate="disk", devices=["disk"])
        for _ in every_event(_MOVE_DEADLINE_S):
            (state,) = (one for one in self.monitor.execute("query-jobs") if one["id"] == job)
            if state["status"] == "concluded":
                self.monitor.execute("job-dismiss", id=job)
                if "error" in state:
                    raise MonitorError(f"{command}: {state['error']}")
                return
        raise MonitorError(f"{command} does not end")


def _wait_for_status(monitor: Monitor, status: str) -> None:
    for _ in every_event(_MOVE_DEADLINE_S):
        if monitor.execute("query-status")["status"] == status:
            return
    raise MonitorError(f"the guest is not {status}")
