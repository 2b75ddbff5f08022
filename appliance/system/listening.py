"""What every long-running server needs: socket files, the descriptor limit, readiness, signals."""

import contextlib
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from appliance.errors import ConfigError

if TYPE_CHECKING:
    import asyncio

# The size of sockaddr_un.sun_path without the terminating NUL (unix(7)).
_SUN_PATH_BYTES: Final = 107


class ListeningSocket(NamedTuple):
    """A socket that listens already, what it is called, and its file, which is removed at the end.

    Whoever serves on it owns the socket and the file.
    """

    socket: socket.socket
    label: str
    path: Path | None = None

    def remove_file(self) -> None:
        """Remove the file of the socket, if it has one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def claim_socket_path(path: Path) -> None:
    """Make sure that a socket can be bound at `path`; remove a socket file without a listener.

    Raises:
        ConfigError: the path is too long, in use, or not a socket.
    """
    num_bytes = len(os.fsencode(path))
    if num_bytes > _SUN_PATH_BYTES:
        raise ConfigError(
            f"socket path {path}: has {num_bytes} bytes, at most {_SUN_PATH_BYTES} are allowed"
        )
    try:
        _remove_stale(path)
    except OSError as exc:
        raise ConfigError(f"socket path {path}: {exc.strerror}") from exc


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
            pass  # there is a listener, but its backlog is full
    raise ConfigError(f"socket path {path}: another process listens there")


@contextlib.contextmanager
def short_socket_path(path: Path) -> Iterator[str]:
    """Yield another path to the socket file at `path`, short enough for a socket address.

    A socket address holds 107 bytes, but the path of a state directory may be longer.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


@contextlib.contextmanager
def socket_mode(mode: int) -> Iterator[None]:
    """Give socket files that are bound within the block the permissions `mode`.

    This sets the umask instead of calling chmod afterwards, because anyone who may write to the
    directory could have put another file in its place by then. The umask belongs to the whole
    process, so other threads must not create files meanwhile.
    """
    old = os.umask(0o777 & ~mode)
    try:
        yield
    finally:
        os.umask(old)


def set_socket_group(path: Path, gid: int) -> None:
    """Change the group of the socket file that this process has bound at `path`.

    Raises:
        ConfigError: another file has taken its place, or this user may not give it to that group.
    """
    with _bound_socket(path) as file:
        try:
            os.chown(file, -1, gid)
        except OSError as exc:
            raise ConfigError(f"socket path {path}: group {gid}: {exc.strerror}") from exc


def set_socket_permissions(path: Path, mode: int) -> None:
    """Give the socket file that this process has bound at `path` the permissions `mode`.

    Bind it through a socket that `make_private` was called for. Unlike `socket_mode`, this changes
    nothing for other threads.

    Raises:
        ConfigError: another file has taken its place, or the file system does not take them.
    """
    with _bound_socket(path) as file:
        try:
            os.chmod(file, mode)  # noqa: PTH101 - not a path that anybody sees
        except OSError as exc:
            raise ConfigError(f"socket path {path}: mode {mode:o}: {exc.strerror}") from exc


def make_private(sock: socket.socket) -> None:
    """Have the file that `sock` will be bound to be for its owner alone.

    Linux creates the socket file with the mode of the socket (unix_bind_bsd in net/unix).
    """
    os.fchmod(sock.fileno(), 0o600)


@contextlib.contextmanager
def _bound_socket(path: Path) -> Iterator[str]:
    # Through a descriptor, because the file at the path may change between two system calls.
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as exc:
        raise ConfigError(f"socket path {path}: {exc.strerror}") from exc
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(f"socket path {path}: another file has taken its place")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


def raise_descriptor_limit() -> None:
    """Raise the soft limit of open descriptors, usually 1024, to the hard limit."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # fs.nr_open has been lowered since
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


# --- Readiness and end ---


def stop_event() -> "asyncio.Event":
    """Return an event that the running loop sets on SIGTERM, SIGINT or SIGHUP.

    SIGHUP is sent when a terminal is closed. It stays ignored if it was ignored when the process
    started, as nohup(1) arranges.
    """
    import asyncio  # noqa: PLC0415 - it takes longer than all that precedes listening

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, stop.set)
    return stop


def announce_ready(text: str) -> None:
    """Write `READY: text` to stderr and report readiness to the service manager."""
    sys.stderr.write(f"READY: {text}\n")
    sys.stderr.flush()
    _notify("READY=1")


def announce_status(text: str) -> None:
    """Tell the service manager in a line what this process does, for `systemctl status`."""
    _notify(f"STATUS={text}")


def has_service_manager() -> bool:
    """Return whether somebody wants to be told."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def watchdog_s() -> float | None:
    """Return how often the service manager wants a sign of life, at least; None: it does not.

    Source: sd_watchdog_enabled(3).
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    is_for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    if not is_for_us or not microseconds.isdecimal() or not int(microseconds):
        return None
    return int(microseconds) / 1e6


def announce_alive() -> None:
    """Give the service manager a sign of life."""
    _notify("WATCHDOG=1")


def announce_stopping() -> None:
    """Report to the service manager that this process has begun to shut down."""
    _notify("STOPPING=1")


def _notify(state: str) -> None:
    """Send `state`, for example "READY=1", to the service manager, if there is one.

    Source: sd_notify(3).
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A service manager that no longer listens is no reason to fail.
    with (
        contextlib.suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        sock.connect(address)
        sock.send(state.encode())
