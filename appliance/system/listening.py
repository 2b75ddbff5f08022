"""What every serving process needs: free socket paths, descriptors, sd_notify, and its end."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.errors import ConfigError

# sockaddr_un.sun_path, less the terminating NUL (unix(7)).
_SUN_PATH_BYTES: Final = 107


def claim_socket_path(path: Path) -> None:
    """Make way for a socket at `path`; a socket file that nobody listens on is removed.

    Raises:
        ConfigError: the path is too long, in use, or not a socket.
    """
    if len(os.fsencode(path)) > _SUN_PATH_BYTES:
        raise ConfigError(f"socket path {path}: longer than {_SUN_PATH_BYTES} bytes")
    try:
        _remove_stale(path)
    except OSError as exc:
        raise ConfigError(f"socket path {path}: {exc.strerror}") from exc


@contextlib.contextmanager
def socket_mode(mode: int) -> Iterator[None]:
    """Have the files of sockets that are bound within the block get `mode`.

    By the umask, and not by a chmod afterwards: who may write in the directory can have put another
    file there by then. The umask is that of the whole process, so other threads must not make files
    meanwhile.
    """
    old = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(old)


def set_socket_group(path: Path, gid: int) -> None:
    """Give the file of a socket that this process has bound at `path` to a group.

    Raises:
        ConfigError: there is another file by now, or this user may not.
    """
    # By a descriptor: what the path leads to may change between two system calls.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(f"socket path {path}: another file has taken its place")
        os.chown(f"/proc/self/fd/{fd}", -1, gid)
    except OSError as exc:
        raise ConfigError(f"socket path {path}: group {gid}: {exc.strerror}") from exc
    finally:
        os.close(fd)


def raise_descriptor_limit() -> None:
    """Let this process have as many descriptors as it may; the soft limit is usually 1024."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # fs.nr_open was lowered since
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def told_to_stop() -> asyncio.Event:
    """Return an event that the running loop sets at SIGTERM, SIGINT or SIGHUP.

    SIGHUP is what a closed terminal sends; who ignores it from the start (nohup(1)) still does.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    return stop


def notify(state: str) -> None:
    """Tell the service manager `state`, e.g. "READY=1"; without one, do nothing.

    Source: sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A manager that does not listen any more is no reason to fail.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        sock.connect(address)
        sock.send(state.encode())


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"socket path {path}: exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # its listener is stuck, with all the connections it queues
    raise ConfigError(f"socket path {path}: another process listens there")
