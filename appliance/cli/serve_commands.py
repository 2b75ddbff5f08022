"""The commands that serve a store: `virtiofs` and `mount`."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from appliance.bounds import FRONT_ENDS_MAX, QUEUE_SIZE_MAX, REQUEST_QUEUES_MAX
from appliance.cli.exported_options import (
    add_exported_options,
    exported_of,
    socket_exported,
    socket_group,
    socket_mode_of,
    split_place,
)
from appliance.cli.listen_options import add_metrics_option, metrics_socket
from appliance.cli.options import (
    add_log_options,
    add_service_options,
    add_state_option,
    is_json_log,
    path_argument,
    service_addresses,
    state_dir,
)
from appliance.cli.output import print_json
from appliance.cli.profile_options import add_profile_options, profiling_of, socket_profiling
from appliance.cli.quantities import add_min_free_option, min_free_bytes
from appliance.cli.substituter_options import add_substituter_options, substitution_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.resolve.exports import Exported
    from appliance.supervisor.profiling import Profiling

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_MAX_MOUNT_WORKERS: Final = 254
_DEFAULT_QUEUE_SIZE: Final = 1024
_DEFAULT_CACHE_SIZE: Final = "10G"
_ANSWERS: Final = "APPLIANCE_ANSWERS"
_MAX_POLL_US: Final = 1_000_000
_DEFAULT_POLL_US: Final = 50


def add_virtiofs(commands: "Subparsers") -> None:
    """Add `appliance virtiofs`."""
    command = commands.add_parser(
        "virtiofs",
        usage="%(prog)s [OPTION]... [SOCKET]",
        help="serve the store to virtual machines over vhost-user",
        description="Serve the store to virtual machines as a vhost-user back-end for virtiofs, "
        "until a signal ends it.",
    )
    command.add_argument(
        "socket", nargs="?", metavar="SOCKET", help="listen on the Unix socket at this path"
    )
    command.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print the capabilities of this back-end as JSON, and exit",
    )
    listening = command.add_argument_group("listening")
    listening.add_argument(
        "--socket-path",
        action="append",
        default=[],
        metavar="PATH[,OPTION=VALUE]...",
        help="listen on the Unix socket at PATH, too, and show a view (view=NAME) or a store path "
        "(root=PATH) to those that connect there, with profiles of their own (profile=NAME, "
        "record-profile=NAME) (default: as --view, --root, --profile and --record-profile say); "
        "may be given several times",
    )
    listening.add_argument(
        "--socket-group",
        metavar="GROUP",
        help="let members of GROUP (a name or number) connect to the sockets created here",
    )
    listening.add_argument(
        "--socket-mode",
        metavar="MODE",
        default="0660",
        help="create sockets with these permissions, in octal (default: 0660)",
    )
    listening.add_argument(
        "--fd", type=int, metavar="FD", help="listen on an inherited socket, by its descriptor"
    )
    listening.add_argument(
        "--listen-dir",
        type=path_argument,
        metavar="DIR",
        help="listen for the virtual machines that `appliance attach` names while this command "
        "runs, by default on NAME.sock in DIR, which is made if it is missing",
    )
    listening.add_argument(
        "--max-front-ends",
        type=int,
        metavar="N",
        default=1,
        help="serve up to N front-ends at a time on each socket, each with a session of its own; "
        "others wait (default: 1)",
    )
    listening.add_argument(
        "--exit-on-disconnect", action="store_true", help="end when a front-end leaves"
    )
    listening.add_argument(
        "--keep-sessions",
        action="store_true",
        help="when a signal ends this command, leave front-ends that are connected to the next one "
        "that is started with the same sockets and state directory",
    )
    listening.add_argument(
        "--migration-on-error",
        choices=("abort", "guest-error"),
        default="abort",
        help="refuse a guest that was saved or moved here and had store paths which are missing "
        "(`abort`), or let it go on and find its files there stale (`guest-error`) (default: "
        "abort)",
    )
    listening.add_argument(
        "--pid-file",
        type=path_argument,
        metavar="PATH",
        help="write the process id to a file at PATH once the sockets listen, and remove it at "
        "the end",
    )
    device = command.add_argument_group("device")
    device.add_argument(
        "--tag", help="the mount tag to give to front-ends that ask the back-end for it"
    )
    device.add_argument(
        "--num-request-queues",
        type=int,
        metavar="N",
        help="offer up to N request queues, each with a worker process (default: one for each CPU)",
    )
    device.add_argument(
        "--queue-size",
        type=int,
        default=_DEFAULT_QUEUE_SIZE,
        metavar="N",
        help="let a queue have up to N descriptors, a power of two (default: "
        f"{_DEFAULT_QUEUE_SIZE})",
    )
    device.add_argument(
        "--poll-us",
        type=int,
        metavar="N",
        help="let a worker poll its queue for up to N microseconds before it sleeps, as long as "
        f"that saves wake-ups; 0 turns it off (default: {_DEFAULT_POLL_US}, or 0 with one CPU)",
    )
    _add_files_options(command, "let guests list the root directory")
    _add_common_options(command)
    command.set_defaults(run=_run_virtiofs)


def add_mount(commands: "Subparsers") -> None:
    """Add `appliance mount`."""
    command = commands.add_parser(
        "mount",
        usage="%(prog)s [OPTION]... DEST",
        help="mount the store on this machine until it is unmounted",
        description="Mount the store on DEST through FUSE, and serve it until it is unmounted or "
        "a signal ends it.",
    )
    command.add_argument("dest", metavar="DEST", type=path_argument, help="an existing directory")
    mount = command.add_argument_group("mount")
    mount.add_argument("--allow-other", action="store_true", help="let other users read the files")
    mount.add_argument(
        "--noexec", action="store_true", help="do not let programs be executed from the mount"
    )
    mount.add_argument(
        "--fsname",
        default="appliance",
        metavar="NAME",
        help="show NAME as the source in lists of mounts (default: appliance)",
    )
    mount.add_argument(
        "--passthrough",
        action="store_true",
        help="let the kernel read large files by itself (needs Linux 6.9 and root)",
    )
    mount.add_argument(
        "--threads",
        type=int,
        default=min(os.cpu_count() or 1, _MAX_MOUNT_WORKERS),
        metavar="N",
        help="run N worker processes (default: one for each CPU)",
    )
    _add_files_options(command, "let the root directory be listed")
    _add_common_options(command)
    command.set_defaults(run=run_mount)


def _add_files_options(command: argparse.ArgumentParser, list_root_help: str) -> None:
    files = command.add_argument_group("files")
    files.add_argument("--list-root", action="store_true", help=list_root_help)
    add_exported_options(files)
    add_profile_options(files)
    files.add_argument(
        "--inodes",
        choices=("place", "content"),
        default="place",
        help="give every name an inode number of its own (`place`), or all equal files the same "
        "(`content`, as Tvix and Snix do; programs then take them for hard links) (default: "
        "place)",
    )


def _add_common_options(command: argparse.ArgumentParser) -> None:
    security = command.add_argument_group("security")
    security.add_argument(
        "--sandbox",
        choices=("on", "none"),
        default="on",
        help="lock worker processes down before they serve, as far as the kernel and the rights of "
        "this process allow, or not at all (default: on)",
    )
    state = command.add_argument_group("state directory")
    add_state_option(state, "keep the cache of remote blobs and the control sockets in DIR")
    state.add_argument(
        "--blob-cache-size",
        metavar="SIZE",
        help="keep up to SIZE of a remote blob service in the state directory: a number of bytes, "
        f"or of KiB, MiB, GiB or TiB with the suffix K, M, G or T (default: "
        f"APPLIANCE_BLOB_CACHE_SIZE, or else {_DEFAULT_CACHE_SIZE})",
    )
    add_min_free_option(state)
    add_substituter_options(command)
    add_metrics_option(command.add_argument_group("metrics"))
    add_service_options(command)
    add_log_options(command)


def _run_virtiofs(options: argparse.Namespace) -> None:
    if options.print_capabilities:
        print_json({"type": "fs", "features": ["migrate-precopy"]})
        return
    paths = [split_place(text)[0] for text in options.socket_path]
    if options.socket is not None:
        paths.insert(0, Path(options.socket))
    if not paths and options.fd is None and options.listen_dir is None:
        raise ConfigError(
            "virtiofs needs a SOCKET, --socket-path, --fd or --listen-dir to listen on"
        )
    if options.socket_group is not None and not paths:
        raise ConfigError(
            "--socket-group: only an inherited socket is listened on, and its group is not changed"
        )
    gid = None if options.socket_group is None else socket_group(options.socket_group)
    mode = socket_mode_of(options.socket_mode)
    fields = _virtiofs_fields(options)
    from appliance.system.bound_socket import BoundSocket

    # Until the event loop takes signals over, the end must not leave files behind either.
    signal.signal(signal.SIGTERM, _exit)
    with ExitStack() as opened:
        # Whoever connects early waits a moment, and need not try again. What follows imports most
        # of the program.
        bound = [opened.enter_context(closing(BoundSocket(p, gid, mode=mode))) for p in paths]
        # Imported here because other commands need neither the event loop nor the C engine.
        from appliance.supervisor.listeners import Listener
        from appliance.supervisor.virtiofs import VirtiofsConfig, serve
        from appliance.vhost.fs_device import encode_tag

        tag = encode_tag(options.tag) if options.tag is not None else None
        config = VirtiofsConfig(**fields, tag=tag)
        default = exported_of(options), profiling_of(options)
        seen = [_seen_on(text, *default) for text in options.socket_path]
        if options.socket is not None:
            seen.insert(0, default)
        listeners = [Listener.of(socket, *what) for socket, what in zip(bound, seen, strict=True)]
        if options.fd is not None:
            inherited = opened.enter_context(closing(Listener.inherit(options.fd, *default)))
            listeners.append(inherited)
        opened.enter_context(_pid_file(options.pid_file))
        metrics = opened.enter_context(metrics_socket(options))
        serve(replace(config, metrics=metrics), listeners)


def _seen_on(
    text: str, default: "Exported", profiling: "Profiling"
) -> "tuple[Exported, Profiling]":
    """Return what front-ends see, and the profiles they have, given a value of --socket-path."""
    _path, given = split_place(text)
    return (
        socket_exported(text, default),
        socket_profiling(given, f"--socket-path {text}: ", profiling),
    )


def _virtiofs_fields(options: argparse.Namespace) -> dict[str, Any]:
    # Those of VirtiofsConfig that can be told, and are checked, without the modules that serve.
    num_request_queues = options.num_request_queues
    if num_request_queues is None:
        num_request_queues = min(os.cpu_count() or 1, REQUEST_QUEUES_MAX)
    services = service_addresses(options)
    return {
        "services": services,
        "blob_cache_bytes": _blob_cache_bytes(options),
        "min_free_bytes": min_free_bytes(options),
        "substitution": substitution_of(options, services),
        "state_dir": state_dir(options, services),
        "is_root_listable": options.list_root,
        "is_by_content": options.inodes == "content",
        "is_sandboxed": options.sandbox == "on",
        "keeps_sessions": options.keep_sessions,
        "is_answered_in_python": _is_answered_in_python(),
        "poll_us": _poll_us(options.poll_us),
        "num_request_queues": _in_range(
            "--num-request-queues", num_request_queues, REQUEST_QUEUES_MAX
        ),
        "exits_on_disconnect": options.exit_on_disconnect,
        "max_front_ends": _in_range("--max-front-ends", options.max_front_ends, FRONT_ENDS_MAX),
        "listen_dir": options.listen_dir,
        "goes_on_without_paths": options.migration_on_error == "guest-error",
        "queue_size": _power_of_two("--queue-size", options.queue_size, QUEUE_SIZE_MAX),
        "log_level": options.log_level,
        "log_json": is_json_log(options),
    }


def _exit(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


@contextmanager
def _pid_file(path: Path | None) -> Iterator[None]:
    """Have a file at `path`, if it is not None, with the id of this process for a block.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Whoever waits for the file must never find it empty.
        new.write_text(f"{os.getpid()}\n")
        new.rename(path)
    except OSError as exc:
        with suppress(OSError):
            new.unlink()
        raise ConfigError(f"--pid-file {path}: {exc.strerror}") from exc
    try:
        yield
    finally:
        with suppress(OSError):
            if path.read_text() == f"{os.getpid()}\n":
                path.unlink()


def run_mount(options: argparse.Namespace, when_ready: Callable[[str], None] | None = None) -> None:
    """Serve a mount until it ends; call `when_ready` with its path once files can be read."""
    from appliance.supervisor.mount import MountConfig, serve
    from appliance.supervisor.mountpoint import MountFlags

    if options.passthrough and os.geteuid() != 0:
        raise ConfigError("--passthrough: only root may use this option")
    if options.passthrough and options.record_profile is not None:
        raise ConfigError(
            "--passthrough and --record-profile: the kernel would read files by itself, so what "
            "is read would not be known"
        )
    services = service_addresses(options)
    config = MountConfig(
        services=services,
        blob_cache_bytes=_blob_cache_bytes(options),
        min_free_bytes=min_free_bytes(options),
        substitution=substitution_of(options, services),
        state_dir=state_dir(options, services),
        is_root_listable=options.list_root,
        is_by_content=options.inodes == "content",
        is_sandboxed=options.sandbox == "on",
        is_answered_in_python=_is_answered_in_python(),
        poll_us=0,
        log_level=options.log_level,
        log_json=is_json_log(options),
        path=options.dest,
        exported=exported_of(options),
        profiling=profiling_of(options),
        num_workers=_in_range("--threads", options.threads, _MAX_MOUNT_WORKERS),
        has_passthrough=options.passthrough,
        flags=MountFlags(options.fsname, options.allow_other, options.noexec),
    )
    with metrics_socket(options) as metrics:
        serve(replace(config, metrics=metrics), when_ready)


def _is_answered_in_python() -> bool:
    # For tests and for comparisons: the bytes of the answers are the same.
    answers = os.environ.get(_ANSWERS, "c")
    if answers not in {"c", "python"}:
        raise ConfigError(f"{_ANSWERS}={answers}: expected c or python")
    return answers == "python"


def _poll_us(given: int | None) -> int:
    if given is not None:
        if not 0 <= given <= _MAX_POLL_US:
            raise ConfigError(f"--poll-us {given}: expected 0 to {_MAX_POLL_US}")
        return given
    # With one, whoever polls keeps the guest from running.
    return _DEFAULT_POLL_US if len(os.sched_getaffinity(0)) > 1 else 0


def _blob_cache_bytes(options: argparse.Namespace) -> int:
    text = (
        options.blob_cache_size
        or os.environ.get("APPLIANCE_BLOB_CACHE_SIZE")
        or _DEFAULT_CACHE_SIZE
    )
    match = re.fullmatch(r"([1-9][0-9]{0,17})([KMGT]?)", text.upper())
    if not match:
        raise ConfigError(
            f"--blob-cache-size {text}: expected a positive integer, with K, M, G or T behind it "
            "or nothing"
        )
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def _in_range(option: str, value: int, maximum: int) -> int:
    if not 1 <= value <= maximum:
        raise ConfigError(f"{option} {value}: expected 1 to {maximum}")
    return value


def _power_of_two(option: str, value: int, maximum: int) -> int:
    if value & (value - 1):
        raise ConfigError(f"{option} {value}: expected a power of two")
    return _in_range(option, value, maximum)
