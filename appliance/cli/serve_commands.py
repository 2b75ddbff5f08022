"""The commands that serve a store: `virtiofs` and `mount`."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import service_addresses, state_dir
from appliance.cli.output import print_json
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_MAX_MOUNT_WORKERS: Final = 254
_MAX_QUEUE_SIZE: Final = 32768
_DEFAULT_QUEUE_SIZE: Final = 1024
# To chown(2), the group that a file has.
_NO_GROUP: Final = 2**32 - 1
_DEFAULT_CACHE_SIZE: Final = "10G"


def path_argument(text: str) -> Path:
    """Return an argument as a path; an empty one would be the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def add_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that bounds the cache of what is remote."""
    parser.add_argument(
        "--blob-cache-size",
        metavar="SIZE",
        help="how much of a remote blob service is kept in the state directory: bytes, or with K, "
        f"M, G or T (default: {_DEFAULT_CACHE_SIZE}; or APPLIANCE_BLOB_CACHE_SIZE)",
    )


def add_virtiofs(commands: "Subparsers", parents: Sequence[argparse.ArgumentParser]) -> None:
    """Add `appliance virtiofs`."""
    command = commands.add_parser(
        "virtiofs", parents=parents, help="serve the store to virtual machines over vhost-user"
    )
    command.add_argument("socket", nargs="?", metavar="SOCKET", help="where to listen")
    command.add_argument(
        "--socket-path",
        action="append",
        default=[],
        metavar="PATH",
        help="where to listen; may be repeated, one front-end at a time on each",
    )
    command.add_argument(
        "--socket-group",
        metavar="GROUP",
        help="the group, by name or number, that may connect to the sockets made here",
    )
    command.add_argument("--fd", type=int, metavar="N", help="inherited listening socket")
    command.add_argument("--list-root", action="store_true", help="let guests list the root")
    _add_inodes(command)
    command.add_argument("--tag", help="mount tag, for front-ends that ask the back-end for it")
    command.add_argument(
        "--num-request-queues",
        type=int,
        metavar="N",
        help="most request queues of a device (default: one for each core)",
    )
    command.add_argument("--queue-size", type=int, default=_DEFAULT_QUEUE_SIZE, metavar="N")
    command.add_argument(
        "--print-capabilities", action="store_true", help="print what this back-end can, and exit"
    )
    command.set_defaults(run=_run_virtiofs)


def _add_inodes(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--inodes",
        choices=("place", "content"),
        default="place",
        help="what st_ino tells apart: every name (place, the default), or contents (content, as "
        "Tvix and Snix do; programs then take equal files for hard links)",
    )


def add_mount(commands: "Subparsers", parents: Sequence[argparse.ArgumentParser]) -> None:
    """Add `appliance mount`."""
    command = commands.add_parser(
        "mount", parents=parents, help="mount the store on this machine, until unmounted"
    )
    command.add_argument("dest", metavar="DEST", type=path_argument, help="an existing directory")
    command.add_argument("--list-root", action="store_true", help="let the root be listed")
    _add_inodes(command)
    command.add_argument(
        "--threads",
        type=int,
        default=min(os.cpu_count() or 1, _MAX_MOUNT_WORKERS),
        metavar="N",
        help="number of worker processes (default: one for each core)",
    )
    command.add_argument("--allow-other", action="store_true", help="let other users in")
    command.add_argument(
        "--passthrough",
        action="store_true",
        help="let the kernel read large files by itself (Linux 6.9, root)",
    )
    command.add_argument("--noexec", action="store_true", help="let no program be started from it")
    command.add_argument(
        "--fsname",
        default="appliance",
        metavar="NAME",
        help="what lists of mounts show as its source (default: appliance)",
    )
    command.add_argument(
        "-f", "--foreground", action="store_true", help="accepted: it is always in the foreground"
    )
    command.set_defaults(run=run_mount)


def _run_virtiofs(options: argparse.Namespace) -> None:
    if options.print_capabilities:
        print_json({"type": "fs", "features": []})
        return
    # Imported here: `import` and `status` need neither the loop nor the C engine.
    from appliance.supervisor.listeners import listen
    from appliance.supervisor.virtiofs import VirtiofsConfig, serve
    from appliance.vhost.fs_device import MAX_REQUEST_QUEUES, encode_tag

    num_request_queues = options.num_request_queues
    if num_request_queues is None:
        num_request_queues = min(os.cpu_count() or 1, MAX_REQUEST_QUEUES)
    services = service_addresses(options)
    config = VirtiofsConfig(
        services=services,
        blob_cache_bytes=_blob_cache_bytes(options),
        state_dir=state_dir(options, services),
        is_root_listable=options.list_root,
        is_by_content=options.inodes == "content",
        tag=encode_tag(options.tag) if options.tag is not None else None,
        num_request_queues=_in_range(
            "--num-request-queues", num_request_queues, MAX_REQUEST_QUEUES
        ),
        queue_size=_power_of_two("--queue-size", options.queue_size, _MAX_QUEUE_SIZE),
        log_level=options.log_level,
        log_json=options.json,
    )
    paths = [Path(path) for path in [options.socket, *options.socket_path] if path is not None]
    if not paths and options.fd is None:
        raise ConfigError("virtiofs needs a SOCKET, --socket-path or --fd to listen on")
    if options.socket_group is not None and not paths:
        raise ConfigError("--socket-group: an inherited socket has its group already")
    gid = None if options.socket_group is None else _group(options.socket_group)
    serve(config, listen(paths, options.fd, gid))


def run_mount(options: argparse.Namespace, when_ready: Callable[[str], None] | None = None) -> None:
    """Serve a mount to its end; `when_ready` is called once it can be used."""
    from appliance.supervisor.mount import MountConfig, serve
    from appliance.supervisor.mountpoint import MountFlags

    if options.passthrough and os.geteuid() != 0:
        raise ConfigError("--passthrough: only root may use it")
    services = service_addresses(options)
    serve(
        MountConfig(
            services=services,
            blob_cache_bytes=_blob_cache_bytes(options),
            state_dir=state_dir(options, services),
            is_root_listable=options.list_root,
            is_by_content=options.inodes == "content",
            log_level=options.log_level,
            log_json=options.json,
            path=options.dest,
            num_workers=_in_range("--threads", options.threads, _MAX_MOUNT_WORKERS),
            has_passthrough=options.passthrough,
            flags=MountFlags(options.fsname, options.allow_other, options.noexec),
        ),
        when_ready,
    )


def _blob_cache_bytes(options: argparse.Namespace) -> int:
    text = (
        options.blob_cache_size
        or os.environ.get("APPLIANCE_BLOB_CACHE_SIZE")
        or _DEFAULT_CACHE_SIZE
    )
    match = re.fullmatch(r"([1-9][0-9]{0,17})([KMGT]?)", text.upper())
    if not match:
        raise ConfigError(
            f"--blob-cache-size {text}: expected a number of bytes, or one with K, M, G or T"
        )
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def _group(text: str) -> int:
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        if text.isdecimal() and int(text) < _NO_GROUP:
            return int(text)
    raise ConfigError(f"--socket-group {text}: there is no such group")


def _in_range(option: str, value: int, maximum: int) -> int:
    if not 1 <= value <= maximum:
        raise ConfigError(f"{option} {value}: expected 1 to {maximum}")
    return value


def _power_of_two(option: str, value: int, maximum: int) -> int:
    if value & (value - 1):
        raise ConfigError(f"{option} {value}: expected a power of two")
    return _in_range(option, value, maximum)
