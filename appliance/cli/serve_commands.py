"""The commands that serve a store: `virtiofs` and `mount`."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NoReturn

from appliance.cli.exported_options import (
    add_exported_options,
    add_profile_options,
    exported_of,
    profiling_of,
)
from appliance.cli.listen_options import metrics_socket
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
from appliance.cli.quantities import min_free_bytes
from appliance.cli.setting_options import add_settings
from appliance.cli.socket_places import socket_places
from appliance.cli.substituter_options import add_substituter_options, substitution_of
from appliance.config.resolution import ValueSource, label_of, source_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_VIRTIOFS: Final = "virtiofs"
_MOUNT: Final = "mount"
_ANSWERS: Final = "APPLIANCE_ANSWERS"


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
        "record-profile=NAME) (default: as the options of these names say); may be given several "
        "times. With this, SOCKET or --fd, sockets in the configuration file are not used",
    )
    listening.add_argument(
        "--fd", type=int, metavar="FD", help="listen on an inherited socket, by its descriptor"
    )
    add_settings(
        listening,
        *("sockets", "listen-dir", "socket-group", "socket-mode", "max-front-ends"),
        *("exit-on-disconnect", "keep-sessions", "migration-on-error", "pid-file"),
        section=_VIRTIOFS,
    )
    device = command.add_argument_group("device")
    add_settings(device, "tag", "num-request-queues", "queue-size", "poll-us", section=_VIRTIOFS)
    _add_common_options(command, _VIRTIOFS)
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
    add_settings(mount, "allow-other", "noexec", "fsname", "passthrough", "threads", section=_MOUNT)
    _add_common_options(command, _MOUNT)
    command.set_defaults(run=run_mount)


def _add_common_options(command: argparse.ArgumentParser, section: str) -> None:
    files = command.add_argument_group("files")
    add_settings(files, "list-root")
    add_exported_options(files)
    add_profile_options(files)
    add_settings(files, "inodes")
    add_settings(command.add_argument_group("security"), "sandbox")
    state = command.add_argument_group("state directory")
    add_state_option(state, "keep the cache of remote blobs and the control sockets in DIR")
    add_settings(state, "blob-cache-size", "min-free")
    add_substituter_options(command)
    add_settings(command.add_argument_group("metrics"), "metrics", section=section)
    add_service_options(command)
    add_log_options(command)


def _run_virtiofs(options: argparse.Namespace) -> None:
    if options.print_capabilities:
        print_json({"type": "fs", "features": ["migrate-precopy"]})
        return
    places = socket_places(options)
    if not places and options.fd is None and options.listen_dir is None:
        raise ConfigError(
            "virtiofs needs a SOCKET, --socket-path, --fd or --listen-dir to listen on, or sockets "
            "in the configuration file"
        )
    if not places and source_of(options, "socket_group") is ValueSource.COMMAND_LINE:
        raise ConfigError(
            "--socket-group: only an inherited socket is listened on, and its group is not changed"
        )
    fields = _virtiofs_fields(options)
    # Until the event loop takes signals over, the end must not leave files behind either.
    signal.signal(signal.SIGTERM, _exit)
    with ExitStack() as opened:
        # Whoever connects early waits a moment, and need not try again. What follows imports most
        # of the program.
        bound = [opened.enter_context(closing(place.bind())) for place in places]
        # Imported here because other commands need neither the event loop nor the C engine.
        from appliance.supervisor.listeners import Listener
        from appliance.supervisor.virtiofs import VirtiofsConfig, serve
        from appliance.vhost.fs_device import encode_tag

        tag = encode_tag(options.tag) if options.tag is not None else None
        config = VirtiofsConfig(**fields, tag=tag)
        default, profiling = exported_of(options), profiling_of(options)
        listeners = [
            Listener.of(
                sock,
                place.exported(default),
                place.terms(config.properties),
                place.profiling(profiling),
            )
            for place, sock in zip(places, bound, strict=True)
        ]
        if options.fd is not None:
            inherited = Listener.inherit(options.fd, default, profiling)
            opened.enter_context(closing(inherited))
            listeners.append(inherited)
        opened.enter_context(_pid_file(options))
        metrics = opened.enter_context(metrics_socket(options))
        serve(replace(config, metrics=metrics), listeners)


def _virtiofs_fields(options: argparse.Namespace) -> dict[str, Any]:
    # Those of VirtiofsConfig that can be told, and are checked, without the modules that serve.
    return {
        **_common_fields(options),
        "keeps_sessions": options.keep_sessions,
        "poll_us": options.poll_us,
        "num_request_queues": options.num_request_queues,
        "exits_on_disconnect": options.exit_on_disconnect,
        "max_front_ends": options.max_front_ends,
        "listen_dir": options.listen_dir,
        "goes_on_without_paths": options.migration_on_error == "guest-error",
        "queue_size": options.queue_size,
    }


def _common_fields(options: argparse.Namespace) -> dict[str, Any]:
    # Those of RuntimeConfig, except for the metrics and what differs.
    services = service_addresses(options)
    return {
        "services": services,
        "blob_cache_bytes": options.blob_cache_size,
        "min_free_bytes": min_free_bytes(options),
        "substitution": substitution_of(options, services),
        "state_dir": state_dir(options, services),
        "is_root_listable": options.list_root,
        "is_by_content": options.inodes == "content",
        "is_sandboxed": options.sandbox == "on",
        "is_answered_in_python": _is_answered_in_python(),
        "log_level": options.log_level,
        "log_json": is_json_log(options),
    }


def _exit(_number: int, _frame: object) -> NoReturn:
    sys.exit(0)


@contextmanager
def _pid_file(options: argparse.Namespace) -> Iterator[None]:
    """Have the file of the setting `pid-file`, with the id of this process, for a block.

    Raises:
        ConfigError: the file cannot be written.
    """
    path: Path | None = options.pid_file
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
        raise ConfigError(f"{label_of(options, 'pid_file')} {path}: {exc.strerror}") from exc
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
        raise ConfigError(f"{label_of(options, 'passthrough')}: only root may use this option")
    if options.passthrough and options.record_profile is not None:
        raise ConfigError(
            f"{label_of(options, 'record_profile')}: with passthrough, the kernel reads files by "
            "itself, so what is read would not be known"
        )
    config = MountConfig(
        **_common_fields(options),
        poll_us=0,
        path=options.dest,
        exported=exported_of(options),
        profiling=profiling_of(options),
        num_workers=options.threads,
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
