"""`appliance-virtiofsd`: the command line of virtiofsd, for launchers that know no other.

libvirt, microvm.nix, virtme-ng, Kata, Proxmox and systemd-vmspawn start a program that takes the
options of virtiofsd. Here they are translated into the words of `appliance virtiofs`, which then
runs in the same process. What virtiofsd's options say about writing, caching and file descriptors
means nothing to a read-only store; it is accepted, and named once in the log at debug level.
Options that ask for something else than what a guest would get are refused.

Sources: virtiofsd 1.14, `virtiofsd --help`; QEMU docs/interop/vhost-user.rst, "Backend program
conventions".
"""

import argparse
import os
import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from appliance import __version__
from appliance.cli.shared_directory import share_words
from appliance.errors import ConfigError

PROGRAM: Final = "appliance-virtiofsd"
CAPABILITIES: Final = {"type": "fs", "features": ["migrate-precopy", "separate-options"]}

_READ_ONLY: Final = "the store is read-only, so a guest has nothing to write"
_OWNERS: Final = "all files belong to root in every guest, whoever owns the store"
# What would change what a guest sees or may do, with the reason why it cannot be had.
_REFUSED: Final = {"writeback": _READ_ONLY, "killpriv_v2": _READ_ONLY}
_FLAGS: Final = (
    "readonly",
    "xattr",
    "announce_submounts",
    "no_announce_submounts",
    "allow_mmap",
    "allow_direct_io",
    "no_readdirplus",
    "no_killpriv_v2",
    "posix_acl_create_fallback",
    "preserve_noatime",
    "migration_verify_handles",
    "migration_confirm_paths",
)
# Options with a value of no effect, and the values that virtiofsd takes; None for any.
_VALUED: Final[dict[str, tuple[str, ...] | None]] = {
    "cache": ("auto", "always", "never", "metadata", "none"),
    "seccomp": ("none", "kill", "log", "trap"),
    "modcaps": None,
    "xattrmap": None,
    "migration_mode": ("find-paths", "file-handles"),
}
# The same, with a value that may be left out, and what that means.
_OPTIONALLY_VALUED: Final = {
    "inode_file_handles": (("never", "fallback", "prefer", "mandatory"), "prefer"),
    "posix_acl": (("never", "auto", "always"), "always"),
    "security_label": (("never", "auto", "always"), "always"),
}
_SANDBOXES: Final = {"namespace": "on", "chroot": "on", "none": "none"}
_LOG_LEVELS: Final = {
    "error": "error",
    "warn": "warning",
    "info": "info",
    "debug": "debug",
    "trace": "debug",
    "off": "error",
    # those of `-o loglevel` and `-o log_level`
    "err": "error",
    "warning": "warning",
}
_MAP: Final = re.compile(r"(.)(\d+)\1(\d+)\1(\d+)\1")
_TRANSLATION: Final = re.compile(r"(?:map|guest|host):(\d+):(\d+):(\d+)")
# Options that are passed on to `appliance virtiofs` as they are, with their values.
_PASSED_ON: Final = (
    "store",
    "blob_service_addr",
    "directory_service_addr",
    "path_info_service_addr",
    "state_dir",
    "tag",
    "socket_group",
    "socket_mode",
    "migration_on_error",
)


class VirtiofsdCall(NamedTuple):
    """A translated command line.

    Attributes:
        words: for `appliance`.
        ignored: what was given and has no effect, as it was given.
        descriptor_limit: the limit of open descriptors to set; 0 leaves it alone.
        is_for_syslog: whether the log goes to the system log.
        defaults: what is used in place of defaults of settings, where nothing else sets them.
    """

    words: list[str]
    ignored: list[str]
    descriptor_limit: int
    is_for_syslog: bool
    defaults: dict[str, object]


def translate(parser: argparse.ArgumentParser, words: Sequence[str]) -> VirtiofsdCall:
    """Translate the command line of virtiofsd; `parser` comes from `add_options`.

    Raises:
        ConfigError: an option asks for what cannot be had, or has a value that it does not take.
    """
    options = parser.parse_args(words)
    options.ignored_compat = []
    for text in options.compat_options:
        _apply_compat(options, text)
    _check_maps(options)
    level = "debug" if options.debug else _LOG_LEVELS[options.log_level]
    translated = ["virtiofs", *_listening_words(options), *share_words(options.shared_dir)]
    translated += [f"--sandbox={_SANDBOXES[options.sandbox]}", f"--log-level={level}"]
    translated += [
        f"--{name.replace('_', '-')}={value}"
        for name in _PASSED_ON
        if (value := getattr(options, name)) is not None
    ]
    leaves = "exit" if options.exit_on_disconnect else "no-exit"
    translated.append(f"--{leaves}-on-disconnect")
    return VirtiofsdCall(
        translated,
        _ignored(options),
        options.rlimit_nofile,
        is_for_syslog=options.syslog,
        # A directory that is shared can be listed.
        defaults={"list_root": True},
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of virtiofsd, and those that say where the store is."""
    sharing = parser.add_argument_group("what is shared")
    sharing.add_argument(
        "--shared-dir",
        metavar="DIR",
        help="/nix/store for the whole store, /nix/store/HASH-NAME for a store path as the root "
        "directory, or a directory with an appliance.toml that says what to share",
    )
    sharing.add_argument("--tag", help="the mount tag, for front-ends that ask the back-end for it")
    for name in _PASSED_ON[:5]:
        sharing.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="DIR" if name == "state_dir" else "URI",
            help="as for `appliance virtiofs`",
        )
    listening = parser.add_argument_group("listening")
    listening.add_argument("--socket-path", metavar="PATH", help="listen on a Unix socket")
    listening.add_argument("--socket", metavar="PATH", help="the same (deprecated)")
    listening.add_argument("--fd", type=int, help="listen on an inherited socket")
    listening.add_argument("--socket-group", metavar="GROUP", help="the group of the socket")
    listening.add_argument("--socket-mode", metavar="MODE", help="its permissions, in octal")
    listening.add_argument(
        "--exit-on-disconnect",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end when the front-end leaves (this is the default)",
    )
    _add_running(parser.add_argument_group("running"))
    ignored = parser.add_argument_group("accepted without effect")
    for name in _FLAGS:
        ignored.add_argument(_flag(name), action="store_true", help="no effect")
    for name, values in _VALUED.items():
        ignored.add_argument(
            _flag(name), choices=values, metavar="VALUE", help=f"no effect{_one_of(values)}"
        )
    for name, (choices, implied) in _OPTIONALLY_VALUED.items():
        ignored.add_argument(
            _flag(name),
            nargs="?",
            const=implied,
            choices=choices,
            metavar="VALUE",
            help=f"no effect{_one_of(choices)}",
        )
    ignored.add_argument("--thread-pool-size", type=int, metavar="N", help="no effect")
    ignored.add_argument("-f", dest="foreground", action="store_true", help="no effect")
    refused = parser.add_argument_group("refused, unless they change no owner")
    for name in _REFUSED:
        refused.add_argument(_flag(name), action="store_true", help="refused")
    for name in ("uid_map", "gid_map", "translate_uid", "translate_gid"):
        refused.add_argument(
            _flag(name), action="append", default=[], metavar="MAP", help="a map of owners"
        )


def _add_running(running: argparse._ArgumentGroup) -> None:
    running.add_argument(
        "--print-capabilities",
        action="store_true",
        help="print the capabilities of this back-end as JSON, and exit",
    )
    running.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"{PROGRAM} {__version__}",
        help="print the version, and exit",
    )
    running.add_argument(
        "--sandbox",
        choices=tuple(_SANDBOXES),
        default="namespace",
        help="`none` for workers that are not locked down",
    )
    running.add_argument(
        "--log-level",
        choices=tuple(_LOG_LEVELS),
        default="info",
        metavar="LEVEL",
        help="error, warn, info, debug, trace (as debug) or off (as error)",
    )
    running.add_argument(
        "-d", dest="debug", action="store_true", help="the same as --log-level debug"
    )
    running.add_argument(
        "--migration-on-error",
        choices=("abort", "guest-error"),
        help="refuse a guest that was moved here and had store paths which are missing (`abort`), "
        "or let it go on and find its files there stale (`guest-error`)",
    )
    running.add_argument("--syslog", action="store_true", help="write to the system log")
    running.add_argument(
        "--rlimit-nofile",
        type=int,
        default=0,
        metavar="N",
        help="limit the number of open descriptors to N; 0 leaves the limit alone",
    )
    running.add_argument(
        "-o",
        dest="compat_options",
        action="append",
        default=[],
        metavar="OPTION[,OPTION]...",
        help="options in their older form, such as source=DIR; two commas stand for one",
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _one_of(values: Sequence[str] | None) -> str:
    return f" ({', '.join(values)})" if values else ""


# --- The older form ---


def _apply_compat(options: argparse.Namespace, text: str) -> None:
    for part in text.replace(",,", "\0").split(","):
        option = part.replace("\0", ",")
        name, equals, value = option.partition("=")
        if equals:
            _apply_valued(options, name, value)
        else:
            _apply_single(options, name)


def _apply_valued(options: argparse.Namespace, name: str, value: str) -> None:
    if name == "source":
        options.shared_dir = value
    elif name in {"loglevel", "log_level"}:
        options.log_level = _chosen(name, value, tuple(_LOG_LEVELS))
    elif name == "sandbox":
        options.sandbox = _chosen(name, value, tuple(_SANDBOXES))
    elif name == "timeout":
        options.ignored_compat = [*options.ignored_compat, f"-o {name}={value}"]
    elif name in _VALUED:
        setattr(options, name, _chosen(name, value, _VALUED[name]))
    else:
        raise ConfigError(f"-o {name}={value}: unknown option")


def _apply_single(options: argparse.Namespace, option: str) -> None:
    # Each of these has a form with `no_` and one without, and only the effect counts here.
    name = option.removeprefix("no_")
    if option == "debug":
        options.debug = True
    elif name in _REFUSED:
        setattr(options, name, option == name)
    elif (
        name in {*_FLAGS, *_OPTIONALLY_VALUED, "flock", "posix_lock", "readdirplus"}
        or option == "norace"
    ):
        options.ignored_compat = [*options.ignored_compat, f"-o {option}"]
    elif option:
        raise ConfigError(f"-o {option}: unknown option")


def _chosen(name: str, value: str, values: Sequence[str] | None) -> str:
    if values is not None and value not in values:
        raise ConfigError(f"-o {name}={value}: expected one of {', '.join(values)}")
    return value


# --- Checks ---


def _check_maps(options: argparse.Namespace) -> None:
    for name, reason in _REFUSED.items():
        if getattr(options, name):
            raise ConfigError(f"{_flag(name)}: cannot be had: {reason}")
    for name, own_id in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        _check_namespace_maps(_flag(name), getattr(options, name), own_id)
    for name in ("translate_uid", "translate_gid"):
        for text in getattr(options, name):
            match = _TRANSLATION.fullmatch(text)
            if not match or match[1] != match[2]:
                raise ConfigError(f"{_flag(name)} {text}: cannot be had: {_OWNERS}")
    if options.rlimit_nofile < 0:
        raise ConfigError(f"--rlimit-nofile {options.rlimit_nofile}: expected 0 or more")
    if options.thread_pool_size is not None and options.thread_pool_size < 0:
        raise ConfigError(f"--thread-pool-size {options.thread_pool_size}: expected 0 or more")


def _check_namespace_maps(flag: str, maps: Sequence[str], own_id: int) -> None:
    """Let maps pass that change no owner.

    libvirt passes two of them if it is run by a user: one by which files of this user are root's in
    the guest, as all files here are, and one of ids that nobody has here.
    """
    matches = [_MAP.fullmatch(text) for text in maps]
    is_for_user = any(match and match.group(2, 3) == ("0", str(own_id)) for match in matches)
    for text, match in zip(maps, matches, strict=True):
        if not match or (match[2] != match[3] and not is_for_user):
            raise ConfigError(f"{flag} {text}: cannot be had: {_OWNERS}")


def _listening_words(options: argparse.Namespace) -> list[str]:
    path = options.socket_path if options.socket_path is not None else options.socket
    if (path is None) == (options.fd is None):
        raise ConfigError("expected either --socket-path or --fd")
    if path is None:
        return [f"--fd={options.fd}"]
    if not path:
        raise ConfigError("--socket-path: the path is empty")
    return [f"--socket-path={path.replace(',', ',,')}", f"--pid-file={path}.pid"]


def _ignored(options: argparse.Namespace) -> list[str]:
    given = [_flag(name) for name in _FLAGS if getattr(options, name)]
    given += [
        f"{_flag(name)}={value}"
        for name in (*_VALUED, *_OPTIONALLY_VALUED, "thread_pool_size")
        if (value := getattr(options, name)) is not None
    ]
    if options.foreground:
        given.append("-f")
    return [*given, *options.ignored_compat]


def limit_descriptors(limit: int) -> None:
    """Set the limit of open descriptors of this process to `limit`, or to the highest that it may.

    No descriptor is held for each file that a guest knows, so nothing depends on a high limit.
    """
    import resource

    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))


def note_ignored(ignored: Sequence[str]) -> None:
    """Name once, at debug level, what was given and has no effect."""
    import logging

    if ignored:
        logging.getLogger(__name__).debug(
            "without effect on a read-only store: %s", " ".join(ignored)
        )
