"""Running a command under another process id, where LMDB takes this one for another process.

LMDB tells processes by their ids. Those of containers begin at 1 in each: the first process of one
and the first of another cannot use a store at the same time. So a command that meets this is run by
a child, which has another id, and this process passes signals on to it and ends as it does.
"""

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

from appliance.db.data_file import is_pid_free
from appliance.errors import PidInUseError

# A process of another container may have any of the ids that come next.
_ATTEMPTS: Final = 256
_PASSED_ON: Final = frozenset(
    {
        signal.SIGTERM,
        signal.SIGINT,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
)
_SIGNAL_STATUS: Final = 128


def leave_shared_pid(environments: Sequence[Path]) -> None:
    """Return if no other process is taken for this one in any of the LMDB `environments`.

    Else the command is run again from its start, by a child that nobody is taken for, and this
    process exits as that does. To be called before anything is begun.

    Raises:
        PidInUseError: there is no such child, however many are made.
    """
    taken = next((path for path in environments if not is_pid_free(path)), None)
    if taken is None:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {*_PASSED_ON, signal.SIGCHLD})
    for _ in range(_ATTEMPTS):
        child = _start_child(environments)
        if child is not None:
            _stand_in_for(child)
    raise PidInUseError(str(taken / "lock.mdb"), os.getpid())


def _start_child(environments: Sequence[Path]) -> int | None:
    verdict, child_verdict = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            if all(map(is_pid_free, environments)):
                _become_command(parent)
        finally:
            os.write(child_verdict, b"no")
            os._exit(1)
    os.close(child_verdict)
    is_refused = os.read(verdict, 1)
    os.close(verdict)
    if not is_refused:
        return pid
    os.waitpid(pid, 0)
    return None


def _become_command(parent: int) -> None:
    from appliance.system import libc  # takes long to load, and only this needs it

    libc.signal_on_parent_death(signal.SIGTERM, parent)
    if os.environ.get("LISTEN_PID") == str(parent):  # sd_listen_fds(3)
        os.environ["LISTEN_PID"] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_PASSED_ON, signal.SIGCHLD})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - as this was run


def _stand_in_for(child: int) -> NoReturn:
    while True:
        received = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
        if received.si_signo != signal.SIGCHLD:
            # What the terminal sends reaches the child by itself.
            if received.si_code <= 0:
                with suppress(ProcessLookupError):
                    os.kill(child, received.si_signo)
            continue
        # As the first process of a container it has the children of those that ended, too.
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                _end_as(os.waitstatus_to_exitcode(ended[1]))


def _end_as(code: int) -> NoReturn:
    if code < 0:
        # As a shell sees it; but the first process of a container is not ended by its own signals.
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
        code = _SIGNAL_STATUS - code
    os._exit(code)
