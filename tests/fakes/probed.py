"""`appliance`, but a worker executes code of a test once it is locked down.

`python -m tests.fakes.probed ARGUMENT...` runs the program, with a fork server whose workers look
for the file that is named by APPLIANCE_TEST_PROBE as they start. The first one to find it takes it
away and executes it just before it serves. Session processes do the same with the file that has
`.session` behind its name. With APPLIANCE_TEST_NO_FILTER, workers have no filter of
system calls, which shows what the other layers refuse.

The code calls `attempt(name, action)`, which writes a line to stderr: that the action was done, or
the error that it failed with. If it is deadly, there is no such line.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

from appliance.supervisor import forker
from tests.fakes.running_command import DEADLINE_S, every_event

PROBE = "APPLIANCE_TEST_PROBE"
NO_FILTER = "APPLIANCE_TEST_NO_FILTER"
FORK_SERVER = "appliance.worker.forkserver"
PATCHED = (
    FORK_SERVER,
    "appliance.worker.startup",
    "appliance.system.libc",
    "appliance.session.session_process",
)


# --- For tests ---


class Probes:
    """Code for the workers of a process, and what came of it.

    Args:
        directory: where the code is put; any worker can rename files in it as it starts.
        log: returns the log of the process, which must be at level DEBUG.
        name: "probe" for workers, "probe.session" for session processes.
    """

    def __init__(self, directory: Path, log: Callable[[], str], name: str = "probe") -> None:
        self.path = directory / name
        self._log = log
        self._start = 0

    def put(self, code: str) -> None:
        """Have the next worker that starts execute `code`."""
        self._start = len(self._log())
        written = self.path.with_suffix(".new")
        written.write_text(code)
        written.rename(self.path)

    def outcomes(self) -> dict[str, str]:
        """Return what came of each attempt once the worker is done, or killed by SIGSYS."""
        for _ in every_event(DEADLINE_S):
            log = self._log()[self._start :]
            lines = [line[6:] for line in log.splitlines() if line.startswith("PROBE ")]
            found: dict[str, str] = {}
            for line in lines:
                found |= json.loads(line)
            if found.pop("end", None):
                return found
            if "killed by SIGSYS" in log:
                return {name: "deadly" if how == "begun" else how for name, how in found.items()}
        raise AssertionError(f"the probe did not end:\n{self._log()}")


# --- In the supervisor ---


def _popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    words = [__spec__.name if word == FORK_SERVER else word for word in command]
    return subprocess.Popen(words, **options)


def _run_supervisor() -> None:
    from appliance.__main__ import main  # noqa: PLC0415 - it is not for tests

    forker.subprocess = SimpleNamespace(  # type: ignore[assignment,attr-defined]
        Popen=_popen, DEVNULL=subprocess.DEVNULL
    )
    main()


# --- In the fork server and its workers ---


def _write(name: str, how: str) -> None:
    os.write(2, f"PROBE {json.dumps({name: how})}\n".encode())


def attempt(name: str, action: Callable[[], object]) -> None:
    """Run `action` and say how it ended."""
    _write(name, "begun")
    try:
        action()
    except OSError as exc:
        _write(name, errno.errorcode[exc.errno or 0])
    except Exception as exc:  # noqa: BLE001 - a mistake in a test
        _write(name, repr(exc))
    else:
        _write(name, "done")


class Calls:
    """System calls that fail with an OSError, by the names of the C library."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def __call__(self, name: str, *arguments: Any) -> int:
        ctypes.set_errno(0)
        result = int(getattr(self._libc, name)(*arguments))
        if result < 0:
            raise OSError(ctypes.get_errno(), name)
        return result


def _open_files() -> dict[str, int]:
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        if entry.is_symlink():
            found[str(entry.readlink())] = int(entry.name)
    return found


class _Taken:
    """The code that this process has taken, and its descriptors before it was locked down."""

    def __init__(self) -> None:
        self.open_files: dict[str, int] = {}
        self._code: CodeType | None = None
        self._call = Calls()

    def take(self, path: Path) -> None:
        mine = path.with_suffix(f".{os.getpid()}")
        try:
            path.rename(mine)
        except FileNotFoundError:
            return
        self._code = compile(mine.read_text(), "probe", "exec")

    def execute(self) -> None:
        if self._code is not None:
            names = {"attempt": attempt, "call": self._call, "open_files": self.open_files}
            names |= {"os": os, "socket": socket, "mmap": mmap, "signal": signal}
            exec(self._code, names | {"ctypes": ctypes, "fcntl": fcntl})
            _write("end", "end")


def _run_fork_server() -> None:
    modules: list[Any] = [import_module(name) for name in PATCHED]
    forkserver, startup, libc, session = modules
    probe = Path(os.environ[PROBE])
    taken = _Taken()
    _probe_workers(startup, taken, probe)
    _probe_sessions(session, taken, probe.with_suffix(".session"))
    if NO_FILTER in os.environ:
        libc.set_seccomp_filter = lambda _program: None
    forkserver.main()


def _probe_workers(startup: Any, taken: _Taken, probe: Path) -> None:
    real_main, real_lock_down = startup.main, startup.lock_down

    def main(*arguments: Any) -> None:
        taken.take(probe)
        real_main(*arguments)

    def lock_down(*arguments: Any) -> None:
        taken.open_files.update(_open_files())
        taken.open_files["blobs"] = arguments[2].enter_blobs()
        real_lock_down(*arguments)

    def before(run: Callable[[Any], None]) -> Callable[[Any], None]:
        def run_probe(loop: Any) -> None:
            taken.execute()
            run(loop)

        return run_probe

    startup.main, startup.lock_down = main, lock_down
    for loop in (startup.RingLoop, startup.DeviceLoop):
        loop.run = before(loop.run)


def _probe_sessions(session: Any, taken: _Taken, probe: Path) -> None:
    real_main, real_lock_down = session.main, session.lock_down_session

    def main(*arguments: Any) -> None:
        taken.take(probe)
        real_main(*arguments)

    def lock_down(*arguments: Any) -> None:
        taken.open_files.update(_open_files())
        real_lock_down(*arguments)
        taken.execute()

    session.main, session.lock_down_session = main, lock_down


if __name__ == "__main__":
    if sys.argv[1].isdecimal():
        _run_fork_server()
    else:
        _run_supervisor()
