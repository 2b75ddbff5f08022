"""Standard error that goes to the system log, for programs that outlive their terminal."""

import os
from pathlib import Path
from typing import Final

# Where the system log listens (syslog(3)).
_SOCKET: Final = Path("/dev/log")


def send_errors_to_system_log(tag: str) -> bool:
    """Have logger(1) write to the system log what this process and its children log from now on.

    Returns:
        Whether there is a system log and a logger(1); otherwise nothing is changed.
    """
    import subprocess  # loading it takes longer than some commands run

    if not _SOCKET.exists():
        return False
    try:
        logger = subprocess.Popen(
            ["logger", "-t", tag, f"--id={os.getpid()}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return False
    if logger.stdin is not None:
        os.dup2(logger.stdin.fileno(), 2)
        logger.stdin.close()
    logger.returncode = 0  # it outlives us; do not warn that it was not waited for
    return True
