"""The helper that mount(8) runs for this type of file system, for /etc/fstab or by hand.

    mount.fuse.appliance SOURCE DIR [-sfnvrw] [-N NAMESPACE] [-t TYPE] [-o OPTION[=VALUE],...]

If that program is not installed, mount(8) runs the helper of libfuse for `fuse.appliance`, which
runs `appliance SOURCE DIR -o OPTIONS`, with the same arguments. If SOURCE is a service address, it
names the store. In any case lists of mounts show SOURCE, because `mount -a` compares it with
/etc/fstab. The options are those of `appliance mount`, with underscores. Options of mount(8) itself
are accepted, but only `noexec` has an effect: the mount is always read-only, without devices and
set-uid programs.

The helper returns once files can be read, and a background process serves the mount. Exit statuses
are those of mount(8).
"""

import getopt
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from appliance.cli.system_log import send_errors_to_system_log
from appliance.errors import ApplianceError, ConfigError

# Exit statuses of mount(8).
EXIT_USAGE: Final = 1
EXIT_FAILURE: Final = 32

_SWITCHES: Final = frozenset({"list_root", "allow_other", "passthrough", "noexec", "keep"})
_VALUED: Final = frozenset(
    {
        "config",
        "store",
        "blob_service_addr",
        "directory_service_addr",
        "path_info_service_addr",
        "state_dir",
        "blob_cache_size",
        "threads",
        "inodes",
        "fsname",
        "root",
        "sandbox",
        "log_level",
        "min_free",
        "log_format",
        "view",
    }
)
# Options that are not overridden when they are given again; all of them count, in order.
_REPEATED: Final = frozenset({"substituter"})
# Options of mount(8) and fuse(8), and options that the kernel lists for a mount, since a remount
# repeats those.
# fmt: off
_WITHOUT_EFFECT: Final = frozenset({
    "defaults", "auto", "noauto", "nofail", "_netdev", "user", "nouser", "users", "nousers",
    "owner", "noowner", "group", "nogroup", "ro", "rw", "suid", "nosuid", "dev", "nodev",
    "exec", "sync", "async", "dirsync", "silent", "loud", "mand", "nomand", "iversion",
    "noiversion", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime",
    "strictatime", "nostrictatime", "lazytime", "nolazytime", "symfollow", "nosymfollow",
    "comment", "helper", "uhelper", "remount", "default_permissions", "subtype", "rootmode",
    "user_id", "group_id", "max_read", "blksize",
})
# fmt: on
_READY: Final = b"ready"


class MountCall(NamedTuple):
    """A parsed call of the helper."""

    words: list[str]
    """Arguments for `appliance`."""
    directory: str
    """The mount point, as given."""
    is_remount: bool
    is_fake: bool
    """Whether only to check the arguments (`mount -f`)."""
    is_noexec: bool


def is_mount_call(words: Sequence[str]) -> bool:
    """Return whether `words`, which do not begin with a command, come from libfuse's helper.

    They are SOURCE, an absolute DIR, and -o then.
    """
    return words[2:3] == ["-o"] and words[1].startswith("/")


def parse_mount_call(words: Sequence[str]) -> MountCall:
    """Parse the arguments that mount(8) gives to a helper.

    Raises:
        ConfigError: an argument is not valid; the text names it.
    """
    try:
        flags, places = getopt.gnu_getopt(list(words), "sfnvrwN:t:o:")
    except getopt.GetoptError as exc:
        raise ConfigError(f"{exc.msg} (expected SOURCE DIR [-o OPTIONS])") from exc
    if len(places) != 2:
        raise ConfigError(f"{len(places)} arguments besides options, expected SOURCE DIR")
    source, directory = places
    is_sloppy = ("-s", "") in flags
    given: dict[str, list[str]] = {}
    for flag, value in flags:
        if flag == "-o":
            _add_options(given, value, is_sloppy=is_sloppy)
    if not any(name == "store" or name.endswith("_addr") for name in given) and ":" in source:
        given["store"] = [source]
    given.setdefault("fsname", [source])
    is_noexec = "noexec" in given
    return MountCall(
        [
            "mount",
            *(_word(name, value) for name, values in given.items() for value in values),
            "--",
            str(Path.cwd() / directory),
        ],
        directory,
        is_remount=any("remount" in value.split(",") for flag, value in flags if flag == "-o"),
        is_fake=("-f", "") in flags,
        is_noexec=is_noexec,
    )


def _add_options(given: dict[str, list[str]], text: str, *, is_sloppy: bool) -> None:
    for option in filter(None, text.split(",")):
        raw_name, equals, value = option.partition("=")
        name = raw_name.replace("-", "_")
        if name == "exec":
            given.pop("noexec", None)
        elif name in _REPEATED and equals:
            given.setdefault(name, []).append(value)
        elif name in _SWITCHES and not equals:
            given[name] = [""]
        elif name in _VALUED and equals:
            given[name] = [value]
        elif name in _SWITCHES | _VALUED | _REPEATED:
            raise ConfigError(f"option {option}: expected {name}{'' if equals else '=VALUE'}")
        elif not (name in _WITHOUT_EFFECT or is_sloppy or raw_name.lower().startswith("x-")):
            raise ConfigError(f"option {option}: unknown to this file system")


def _word(name: str, value: str) -> str:
    flag = f"--{name.replace('_', '-')}"
    return flag if name in _SWITCHES else f"{flag}={value}"


def serve_in_background(serve: Callable[[Callable[[str], None]], None]) -> NoReturn:
    """Run `serve` in a background process, and exit once it has called its argument or failed.

    The background process writes its log to the system log, unless stderr is a file or a socket
    (such as the journal's). It must not keep a pipe open, because a program that reads the output
    of mount(8) until its end would then wait until the mount ends.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _serve(serve, writing)
    os.close(writing)
    with open(reading, "rb") as status:  # noqa: PTH123 - a descriptor
        text = status.read()
    if text == _READY:
        os._exit(0)
    _pid, wait_status = os.waitpid(pid, 0)
    sys.stderr.write(
        text.decode(errors="replace") or "appliance: failed; the system log has details\n"
    )
    sys.exit(EXIT_USAGE if os.waitstatus_to_exitcode(wait_status) == EXIT_USAGE else EXIT_FAILURE)


def _serve(serve: Callable[[Callable[[str], None]], None], status: int) -> NoReturn:
    is_ready = False

    def when_ready(_place: str) -> None:
        nonlocal is_ready
        is_ready = True
        os.write(status, _READY)
        os.close(status)

    os.setsid()
    _detach_streams()
    os.chdir("/")
    code = 0
    try:
        serve(when_ready)
    except (ApplianceError, OSError) as exc:
        code = EXIT_USAGE if isinstance(exc, ConfigError) else EXIT_FAILURE
        line = f"appliance: {exc}\n"
        if is_ready:
            sys.stderr.write(line)
        else:
            os.write(status, line.encode(errors="replace"))
    sys.exit(code)


def _detach_streams() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    kind = os.fstat(2).st_mode
    if stat.S_ISREG(kind) or stat.S_ISSOCK(kind):
        return
    if not send_errors_to_system_log("appliance"):
        os.dup2(null, 2)
