"""Runs a command in a child if LMDB would confuse this process with one of another container.

LMDB identifies processes by their process ids, which begin at 1 in each container. So the first
process of one container and the first of another cannot use a store at the same time. A command
that finds its own id in use is run again by a child process, which has another id. The parent
passes signals on to the child and exits as the child does.
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

# Children to try, because processes of other containers may use the next ids, too.
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
    """Return if the id of this process is free in all LMDB `environments`.

    If it is in use, run the command from its start in a child with an id that is free, and exit as
    the child does. The caller must not have done anything with effects before.

    Args:
        environments: directories of the environments.

    Raises:
        PidInUseError: the ids of all children that were tried are in use, too.
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
    from appliance.system import libc  # slow to import, and needed only here

    libc.signal_on_parent_death(signal.SIGTERM, parent)
    if os.environ.get("LISTEN_PID") == str(parent):  # sd_listen_fds(3)
        os.environ["LISTEN_PID"] = str(os.getpid())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_PASSED_ON, signal.SIGCHLD})
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - the same command


def _stand_in_for(child: int) -> NoReturn:
    while True:
        received = signal.sigwaitinfo({*_PASSED_ON, signal.SIGCHLD})
        if received.si_signo != signal.SIGCHLD:
            # The terminal sends its signals to the child, too; only pass on those from processes.
            if received.si_code <= 0:
                with suppress(ProcessLookupError):
                    os.kill(child, received.si_signo)
            continue
        # The first process of a container also has to wait for the orphans in it.
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            if ended[0] == child:
                _end_as(os.waitstatus_to_exitcode(ended[1]))


def _end_as(code: int) -> NoReturn:
    if code < 0:
        # End by the same signal. The first process of a container cannot send itself one that ends
        # it; that exits with the status that a shell shows for the signal.
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
        code = _SIGNAL_STATUS - code
    os._exit(code)
