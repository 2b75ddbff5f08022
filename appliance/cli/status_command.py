"""`appliance status` and `appliance metrics`: what the running supervisors serve, once."""

import argparse
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    add_state_option,
    service_addresses,
    state_dir,
)
from appliance.cli.output import print_json, write
from appliance.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_SOCKETS: Final = "look for the supervisors' control sockets in DIR"
_ACCEPT: Final = {
    "text": "text/plain",
    "openmetrics": "application/openmetrics-text; version=1.0.0",
}
_MEBIBYTE: Final = 1 << 20
# In reports, for metrics only.
_HISTOGRAMS: Final = "histograms"
_UNITS: Final = (("d", 86400), ("h", 3600), ("min", 60))


def add_status(commands: "Subparsers") -> None:
    """Add `appliance status`."""
    command = commands.add_parser(
        "status",
        usage="%(prog)s [OPTION]...",
        help="show the sessions of running supervisors",
        description="Show what the running `appliance virtiofs` and `appliance mount` serve: their "
        "sessions, worker processes, and the number of requests of each kind.",
    )
    add_json_option(command)
    add_state_option(command, _SOCKETS)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_status)


def add_metrics(commands: "Subparsers") -> None:
    """Add `appliance metrics`."""
    command = commands.add_parser(
        "metrics",
        usage="%(prog)s [OPTION]...",
        help="print the metrics of running supervisors once",
        description="Print the metrics of the running `appliance virtiofs` and `appliance mount`, "
        "for a textfile collector or to look at. `--metrics` of these commands serves them.",
    )
    command.add_argument(
        "--format",
        choices=tuple(_ACCEPT),
        default="text",
        help="the text format of Prometheus, or OpenMetrics (default: text)",
    )
    add_state_option(command, _SOCKETS)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_metrics)


def running_reports(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the reports of the supervisors that `options` stand for.

    Raises:
        StoreError: there is none, or one does not answer.
    """
    from appliance.supervisor.status import collect

    directory = state_dir(options, service_addresses(options))
    reports = collect(directory)
    if not reports:
        raise StoreError(f"no supervisor is running on {directory}")
    return reports


def _run_metrics(options: argparse.Namespace) -> None:
    from appliance.supervisor.exposition import exposition

    body, _content_type = exposition(running_reports(options), _ACCEPT[options.format])
    write(body)


def _run_status(options: argparse.Namespace) -> None:
    reports = running_reports(options)
    sessions = [session for report in reports for session in report["sessions"]]
    waiting = [front_end for report in reports for front_end in report.get("waiting", ())]
    attached = [row for report in reports for row in report.get("attached", ())]
    if options.json:
        supervisors = [
            {key: report[key] for key in ("supervisor", "store", "remote") if key in report}
            for report in reports
        ]
        plain = [{k: v for k, v in session.items() if k != _HISTOGRAMS} for session in sessions]
        report = {
            "sessions": plain,
            "waiting": waiting,
            "attached": attached,
            "supervisors": supervisors,
        }
        print_json(report, indent=2)
        return
    for report in reports:
        print(_supervisor_line(report))
    if not sessions:
        print("no front-end is connected")
    for session in sessions:
        for line in _session_lines(session):
            print(line)
    for front_end in waiting:
        print(
            f"{front_end['socket']}: process {front_end['pid']} waits for the connected front-end"
            " to disconnect"
        )
    for row in attached:
        error = f", which cannot be served: {row['error']}" if "error" in row else ""
        print(f"{row['name']} is attached at {row['socket']}{error}")


def _supervisor_line(report: "Mapping[str, Any]") -> str:
    supervisor, store = report["supervisor"], report.get("store")
    line = f"supervisor {supervisor['pid']}, {supervisor['version']}, up"
    line += f" {duration(supervisor['uptime_s'])}"
    if store is not None:
        kind = "cache" if store["is_cache"] else "store"
        line += f"; {kind} {store['path']}: {store['entries']['path_infos']} paths"
    return line


def _session_lines(session: "Mapping[str, Any]") -> "Iterator[str]":
    yield session.get("socket") or session["mount"]
    for worker in session["workers"]:
        queues = ", ".join(map(str, worker["queues"]))
        yield f"  worker {worker['pid']}: queue {queues}, {worker['restarts']} restarts"
    for what, held in session.get("holds", {}).items():
        yield f"  {what}: {held}"
    yield f"  memory: {session['memory_bytes'] / _MEBIBYTE:.1f} MiB"
    for opcode, count in sorted(session["requests"].items()):
        latency = session["latency_us"][opcode]
        errors = session["errors"].get(opcode, {})
        yield (
            f"  {opcode:<12} {count:>12}   p50 < {latency['p50']:,.1f} us"
            f"   p99 < {latency['p99']:,.1f} us"
            + "".join(f"   {name} {number}" for name, number in errors.items())
        )
    for kind, wanted in session["wants"]["kinds"].items():
        outcomes = "   ".join(f"{name} {number}" for name, number in wanted["outcomes"].items())
        yield f"  wanted {kind}: {outcomes}"


def duration(seconds: float) -> str:
    """Return a duration in its largest unit and the next one, or in seconds."""
    left = int(seconds)
    for at, (unit, size) in enumerate(_UNITS):
        if left >= size:
            number, rest = divmod(left, size)
            below = _UNITS[at + 1 :]
            more = f" {rest // below[0][1]} {below[0][0]}" if below else ""
            return f"{number} {unit}{more}"
    return f"{left} s"
