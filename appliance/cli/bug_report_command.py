"""`appliance bugreport`: what somebody needs who is to find a fault, in one archive.

There are no contents of files in it and no keys; whatever goes in passes `redaction`.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance import __version__
from appliance.cli.options import (
    add_log_options,
    add_service_options,
    add_state_option,
    service_addresses,
    state_dir,
)
from appliance.cli.output import write_line
from appliance.cli.redaction import redacted
from appliance.errors import ApplianceError, ConfigError, StoreError

if TYPE_CHECKING:
    import tarfile
    from importlib.metadata import Distribution

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_MODE: Final = 0o600
_LOG_LINES: Final = 2000
_COMMAND_DEADLINE_S: Final = 20
_VARIABLES: Final = ("APPLIANCE_", "BLOB_SERVICE_", "DIRECTORY_SERVICE_", "PATH_INFO_SERVICE_")
# Of the kernel and of this process, as they are there.
_FILES: Final = (
    *("/etc/os-release", "/proc/version", "/proc/meminfo", "/proc/filesystems"),
    *("/proc/self/limits", "/proc/self/cgroup", "/proc/self/uid_map"),
    *("/proc/sys/fs/nr_open", "/proc/sys/kernel/pid_max", "/sys/kernel/security/lsm"),
)


def add_bug_report(commands: "Subparsers") -> None:
    """Add `appliance bugreport`."""
    command = commands.add_parser(
        "bugreport",
        usage="%(prog)s [OPTION]...",
        help="collect what a report of a fault needs, in an archive",
        description="Write an archive with versions, options, what `appliance doctor`, `status` "
        "and `metrics` show, units, and the last lines of the log. There are no contents of files, "
        "keys or passwords in it, but paths and names of sockets; look through it before you pass "
        "it on.",
    )
    command.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write a .tar.gz to FILE (default: appliance-bugreport-TIME.tar.gz here)",
    )
    command.add_argument(
        "--log",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help=f"also add the last {_LOG_LINES} lines of a log in FILE (default: the journal of the "
        "units); may be given several times",
    )
    add_state_option(command, "look for the supervisors' control sockets in DIR")
    add_service_options(command)
    add_log_options(command)
    # The file may be what the report is about.
    faults: list[ConfigError] = []
    command.set_defaults(
        run=_run_bug_report,
        opens_no_store=True,
        when_config_faulty=faults.append,
        config_faults=faults,
    )


def _run_bug_report(options: argparse.Namespace) -> None:
    import tarfile
    import time

    path = options.output or Path(time.strftime("appliance-bugreport-%Y%m%d-%H%M%S.tar.gz"))
    for log in options.log:
        if not log.is_file():
            raise ConfigError(f"--log {log}: is no file")
    parts: dict[str, Callable[[], str]] = {
        "versions.txt": _versions,
        "config.txt": lambda: _config(options),
        "options.txt": lambda: _options(options),
        "host.txt": _host,
        "doctor.json": lambda: _doctor(options),
        "status.json": lambda: _status(options),
        "metrics.txt": lambda: _metrics(options),
        "processes.txt": lambda: _processes(options),
        "units.txt": lambda: _output("systemctl", "cat", "--no-pager", "appliance*"),
        "journal.txt": lambda: _output(
            *("journalctl", "--no-pager", "--output=short-iso", f"--lines={_LOG_LINES}"),
            "--unit=appliance*",
        ),
        **{f"log{number}.txt": partial(_last_lines, log) for number, log in enumerate(options.log)},
    }
    top = path.name.removesuffix(".gz").removesuffix(".tar") or "appliance-bugreport"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, part in parts.items():
            _add(archive, f"{top}/{name}", part)
    write_line(str(path))


def _add(archive: "tarfile.TarFile", name: str, part: Callable[[], str]) -> None:
    import io
    import tarfile
    import time

    # Whatever is broken here may be what the report is about.
    try:
        text = part()
    except (ApplianceError, OSError, ValueError) as exc:
        text = f"cannot be had: {exc}\n"
    data = redacted(text).encode("utf-8", "backslashreplace")
    entry = tarfile.TarInfo(name)
    entry.size, entry.mtime, entry.mode = len(data), int(time.time()), _MODE
    archive.addfile(entry, io.BytesIO(data))


# --- The parts ---


def _versions() -> str:
    from importlib.metadata import distributions

    def line(found: "Distribution") -> str:
        return f"{found.metadata['Name']} {found.version}"

    packages = sorted({line(found) for found in distributions()})
    kernel = " ".join(os.uname())
    return "\n".join(
        [f"appliance {__version__}", f"Python {sys.version}", kernel, "", *packages, ""]
    )


def _options(options: argparse.Namespace) -> str:
    lines = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES)
    ]
    try:
        services = service_addresses(options)
        lines += [f"{kind}: {address.label()}" for kind, address in services._asdict().items()]
        lines.append(f"state directory: {state_dir(options, services)}")
    except ConfigError as exc:
        lines.append(f"refused: {exc}")
    return "\n".join([*lines, ""])


def _config(options: argparse.Namespace) -> str:
    from appliance.cli.config_command import in_force_lines

    faults = [f"refused: {fault}" for fault in options.config_faults]
    return "\n".join([*faults, *in_force_lines(options), ""])


def _host() -> str:
    parts = []
    for name in _FILES:
        try:
            text = Path(name).read_text(errors="replace")
        except OSError as exc:
            text = f"{exc.strerror}\n"
        parts.append(f"== {name}\n{text}\n")
    return "".join(parts)


def _doctor(options: argparse.Namespace) -> str:
    from appliance.doctor.examination import examine
    from appliance.doctor.findings import IN_PRODUCTION, Use

    uses = [use for use in Use if use in IN_PRODUCTION]
    findings = examine(uses, service_addresses(options).one_store(), [])
    return _json([finding.as_json() for finding in findings])


def _status(options: argparse.Namespace) -> str:
    return _json(_reports(options))


def _metrics(options: argparse.Namespace) -> str:
    from appliance.supervisor.exposition import exposition

    return exposition(_reports(options), "")[0].decode()


def _processes(options: argparse.Namespace) -> str:
    parts = []
    for report in _reports(options):
        pids = [report["supervisor"]["pid"]]
        for session in report["sessions"]:
            pids += [session.get("pid", 0), *(worker["pid"] for worker in session["workers"])]
        for pid in filter(None, pids):
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError as exc:
                text = f"{exc.strerror}\n"
            parts.append(f"== {pid}\n{text}\n")
    return "".join(parts)


def _reports(options: argparse.Namespace) -> list[dict[str, Any]]:
    from appliance.supervisor.status import collect

    reports = collect(state_dir(options, service_addresses(options)))
    if not reports:
        raise StoreError("no supervisor is running")
    return reports


def _json(value: list[Any] | Mapping[str, Any]) -> str:
    import json

    return json.dumps(value, indent=1, default=str) + "\n"


def _output(*words: str) -> str:
    """Return what a command prints, or why it cannot."""
    import subprocess

    try:
        ended = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_COMMAND_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{words[0]}: no end within {_COMMAND_DEADLINE_S} s\n"
    return ended.stdout.decode(errors="replace")


def _last_lines(path: Path) -> str:
    from collections import deque

    with path.open(errors="replace") as file:
        return "".join(deque(file, _LOG_LINES))
