"""The command line: options and environment are read once, errors become exit statuses."""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from appliance import __version__
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.cli.http_command import add_http
from appliance.cli.mount_commands import is_mount_call
from appliance.cli.options import (
    add_service_options,
    add_store_option,
    environments,
    service_addresses,
    state_dir,
)
from appliance.cli.output import print_json
from appliance.cli.pid_file import leave_shared_pid
from appliance.cli.serve_commands import (
    add_cache_option,
    add_mount,
    add_virtiofs,
    path_argument,
    run_mount,
)
from appliance.cli.store_commands import COMMANDS as STORE_COMMANDS
from appliance.cli.terminal import (
    drop_output,
    open_missing_streams,
    print_utf8,
    progress_line,
    terminal_columns,
    writing_output,
)
from appliance.errors import ApplianceError, ConfigError, StoreError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction["_Parser"]  # noqa: SLF001 - has no other name

_COMMANDS: Final = ("import", "virtiofs", "mount", "http", "status", *STORE_COMMANDS)
_PRINTS_JSON: Final = frozenset({"status", "path-info", "ls", "verify"})
_EXIT_FAILURE: Final = 1
_EXIT_USAGE: Final = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    open_missing_streams()
    print_utf8()
    try:
        _run(sys.argv[1:] if argv is None else argv)
    except ConfigError as exc:
        _fail(_EXIT_USAGE, exc)
    except ApplianceError as exc:
        _fail(_EXIT_FAILURE, exc)
    except KeyboardInterrupt:
        # Not a status: a shell goes on with the next command unless the signal ended this one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output is gone; what it did not read is its own affair.
        drop_output()
        sys.exit(_EXIT_FAILURE)
    except OSError as exc:
        # This machine refuses: it has no descriptor or process for us.
        import logging

        logging.getLogger(__name__).debug("where it happened:", exc_info=exc)
        reason = exc.strerror or str(exc)
        _fail(_EXIT_FAILURE, f"{exc.filename}: {reason}" if exc.filename else reason)


def mount_helper(argv: Sequence[str] | None = None) -> NoReturn:
    """Do what mount(8) asks of a file system's helper, and exit with its status."""
    from appliance.cli.mount_commands import (
        EXIT_FAILURE,
        EXIT_USAGE,
        parse_mount_call,
        serve_in_background,
    )

    open_missing_streams()
    try:
        call = parse_mount_call(sys.argv[1:] if argv is None else argv)
        with _exiting(EXIT_USAGE):
            options = _parser("mount").parse_args(call.words)
        if call.is_remount and not call.is_fake:
            from appliance.supervisor.mountpoint import remount

            remount(Path(call.directory), is_noexec=call.is_noexec)
    except ConfigError as exc:
        _fail(EXIT_USAGE, exc)
    except ApplianceError as exc:
        _fail(EXIT_FAILURE, exc)
    if call.is_remount or call.is_fake:
        sys.exit(0)

    def serve(when_ready: Callable[[str], None]) -> None:
        _start_logging(options)
        run_mount(options, when_ready)

    serve_in_background(serve)


@contextmanager
def _exiting(status: int) -> Iterator[None]:
    """Exit with `status` where the parser of arguments exits."""
    try:
        yield
    except SystemExit as exc:
        sys.exit(status if exc.code else 0)


def _run(words: Sequence[str]) -> None:
    if is_mount_call(words, _COMMANDS):
        mount_helper(words)
    options = _parser(words[0] if words else "").parse_args(words)
    if options.command != "import":  # which does it when its processes are at work
        _start_logging(options)
    leave_shared_pid(environments(options))
    options.run(options)
    with writing_output():
        sys.stdout.flush()


class _Formatter(argparse.HelpFormatter):
    """As wide as the terminal; the base class loads four compressors to find out."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=terminal_columns() - 2)


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        # Never abbreviated: what is short for one option today may be for two tomorrow.
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        # One line, as for every other bad value; --help has the rest.
        _fail(_EXIT_USAGE, ConfigError(f"{message} (see {self.prog} --help)"))


def _fail(status: int, reason: Exception | str) -> NoReturn:
    # Arguments that the locale could not decode come out as they went in.
    text = str(reason).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    for line in text.rstrip("\n").split("\n"):
        print(f"appliance: {line}", file=sys.stderr)
    sys.exit(status)


def _start_logging(options: argparse.Namespace) -> None:
    from appliance.log import configure_logging

    is_json = options.json and options.command not in _PRINTS_JSON
    configure_logging(options.log_level, is_json=is_json)


def _parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of `command`, or of all if there is none of that name."""
    common = _Parser(add_help=False)
    common.add_argument(
        "--log-level",
        type=str.upper,
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default="INFO",
        help="least severe events to log (default: info)",
    )
    common.add_argument(
        "--json",
        action="store_true",
        help="log as JSON; status, path-info, ls and verify: print JSON",
    )
    state = _Parser(add_help=False)
    state.add_argument(
        "--state-dir",
        metavar="DIR",
        help="where the cache and the control sockets are (default: beside the store; or "
        "APPLIANCE_STATE_DIR)",
    )
    store = _Parser(add_help=False)
    add_store_option(store)
    services = _Parser(add_help=False, parents=[store])
    add_service_options(services)
    cache = _Parser(add_help=False)
    add_cache_option(cache)
    parser = _Parser(
        prog="appliance",
        description="A read-only file system server over a content-addressed store.",
    )
    parser.add_argument("--version", action="version", version=f"appliance {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders: dict[str, Callable[[], None]] = {
        "import": partial(_add_import, commands, [common, services]),
        "virtiofs": partial(add_virtiofs, commands, [common, services, state, cache]),
        "mount": partial(add_mount, commands, [common, services, state, cache]),
        "http": partial(add_http, commands, [common, services]),
        "status": partial(_add_status, commands, [common, services, state]),
    }
    for name, add_command in STORE_COMMANDS.items():
        adders[name] = partial(add_command, commands, [common, services])
    for add in [adders[command]] if command in adders else adders.values():
        add()
    return parser


def _add_import(commands: "Subparsers", parents: "list[_Parser]") -> None:
    command = commands.add_parser(
        "import", parents=parents, help="put files, directories or symlinks into the store"
    )
    command.add_argument(
        "--directory-sizes",
        choices=[dialect.option() for dialect in SizeDialect],
        default=DEFAULT_DIALECT.option(),
        help="how directories count their entries, which is part of their digests: doubled, as "
        "Tvix and Snix do since August 2024, or as the format is documented, for older ones and "
        "castore-go; each refuses the other (default: doubled)",
    )
    command.add_argument(
        "--name", help="name of the store path (default: the last component of PATH)"
    )
    command.add_argument("paths", nargs="+", metavar="PATH", type=path_argument)
    command.set_defaults(run=_run_import)


def _add_status(commands: "Subparsers", parents: "list[_Parser]") -> None:
    command = commands.add_parser(
        "status", parents=parents, help="show the sessions of running supervisors"
    )
    command.set_defaults(run=_run_status)


def _run_import(options: argparse.Namespace) -> None:
    from appliance.importer.importer import import_paths

    # Nothing in an import makes cycles worth a search for them, now or at its end.
    gc.disable()
    gc.freeze()
    services = service_addresses(options)
    dialect = SizeDialect[options.directory_sizes.upper()]
    name = _new_name(options)
    with progress_line() as progress:

        def warn(text: str) -> None:
            import logging

            progress.clear()
            logging.getLogger("appliance.importer").warning(text)

        imports = import_paths(
            services,
            options.paths,
            progress=progress,
            warn=warn,
            dialect=dialect,
            name=name,
            when_begun=partial(_start_logging, options),
        )
        with closing(imports):
            for imported in imports:
                progress.clear()
                with writing_output():
                    print(imported, flush=True)


def _run_status(options: argparse.Namespace) -> None:
    from appliance.supervisor.status import collect

    directory = state_dir(options, service_addresses(options))
    reports = collect(directory)
    if not reports:
        raise StoreError(f"no supervisor is running on {directory}")
    sessions = [session for report in reports for session in report["sessions"]]
    waiting = [front_end for report in reports for front_end in report.get("waiting", ())]
    if options.json:
        print_json({"sessions": sessions, "waiting": waiting}, indent=2)
        return
    if not sessions:
        print("no front-end is connected")
    for session in sessions:
        print(session.get("socket") or session["mount"])
        for worker in session["workers"]:
            queues = ", ".join(map(str, worker["queues"]))
            print(f"  worker {worker['pid']}: queue {queues}, {worker['restarts']} restarts")
        for opcode, count in sorted(session["requests"].items()):
            print(f"  {opcode:<12} {count:>12}")
    for front_end in waiting:
        print(
            f"{front_end['socket']}: process {front_end['pid']} waits for the one served to leave"
        )


# Values read once, with the rule they break named.


def _new_name(options: argparse.Namespace) -> str | None:
    from appliance.nix.store_path import StorePathError, check_new_name

    if options.name is None:
        return None
    if len(options.paths) > 1:
        raise ConfigError(f"--name {options.name}: goes with one PATH only")
    try:
        return check_new_name(options.name)
    except StorePathError as exc:
        raise ConfigError(f"--name {exc}") from exc
