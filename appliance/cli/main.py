"""Entry points of the command line: parse the arguments, run one command, exit with its status.

The command `import` is defined here, the others in the modules beside this one.
"""

import argparse
import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from appliance import __version__
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.cli.help_pages import CommandParser, GroupsParser
from appliance.cli.options import (
    add_log_options,
    add_service_options,
    environments,
    is_json_log,
    path_argument,
    progress_form,
    service_addresses,
)
from appliance.cli.output import print_json
from appliance.cli.pid_file import leave_shared_pid
from appliance.cli.terminal import (
    drop_output,
    open_missing_streams,
    print_utf8,
    progress_line,
    writing_output,
)
from appliance.config.resolution import settle
from appliance.errors import ApplianceError, ConfigError
from appliance.system.tracing import span, start_tracing

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[CommandParser]  # noqa: SLF001 - has no other name

# For each command, the module beside this one that defines it, and the function there that adds its
# parser. Only what is needed is loaded: all of them take longer to load than some commands run.
_ADDERS: Final = {
    "import": ("main", "add_import"),
    "virtiofs": ("serve_commands", "add_virtiofs"),
    "attach": ("attach_command", "add_attach"),
    "detach": ("attach_command", "add_detach"),
    "mount": ("serve_commands", "add_mount"),
    "view": ("view_command", "add_view"),
    "profile": ("profile_command", "add_profile"),
    "http": ("http_command", "add_http"),
    "status": ("status_command", "add_status"),
    "top": ("top_command", "add_top"),
    "metrics": ("status_command", "add_metrics"),
    "bench": ("bench_command", "add_bench"),
    "doctor": ("doctor_command", "add_doctor"),
    "config": ("config_command", "add_config"),
    "bugreport": ("bug_report_command", "add_bug_report"),
    "copy": ("copy_command", "add_copy"),
    "import-nar": ("import_nar_command", "add_import_nar"),
    "daemon": ("daemon_command", "add_daemon"),
    "nar": ("store_commands", "add_nar"),
    "path-info": ("path_info_command", "add_path_info"),
    "registration": ("registration_command", "add_registration"),
    "verify": ("verify_command", "add_verify"),
    "ls": ("store_commands", "add_ls"),
    "cat": ("store_commands", "add_cat"),
    "gc": ("gc_command", "add_gc"),
    "delete": ("gc_command", "add_delete"),
    "root": ("root_command", "add_root"),
    "du": ("du_command", "add_du"),
}
# Those that are traced; `import` begins once its processes have been forked.
_TRACED: Final = frozenset({"virtiofs", "mount", "daemon", "http", "copy", "import-nar"})
_EXIT_FAILURE: Final = 1
_EXIT_USAGE: Final = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    _run_guarded(_run, argv)


def virtiofsd(argv: Sequence[str] | None = None) -> None:
    """Run as a program with the command line of virtiofsd, and exit with its status."""
    _run_guarded(_run_virtiofsd, argv)


def _run_guarded(run: Callable[[Sequence[str]], None], argv: Sequence[str] | None) -> None:
    """Call `run` with the words of the command line, and turn errors into lines and statuses."""
    open_missing_streams()
    print_utf8()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except ConfigError as exc:
        _fail(_EXIT_USAGE, exc)
    except ApplianceError as exc:
        _fail(_EXIT_FAILURE, exc)
    except KeyboardInterrupt:
        # End by the signal, not with a status: a shell that runs a script stops only for a signal.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BrokenPipeError:
        # The reader of our output has closed it, so there is nobody left to report to.
        drop_output()
        sys.exit(_EXIT_FAILURE)
    except OSError as exc:
        # An error of this machine that nothing else has explained; it may be out of descriptors or
        # processes.
        import logging

        logging.getLogger(__name__).debug("where it happened:", exc_info=exc)
        reason = exc.strerror or str(exc)
        _fail(_EXIT_FAILURE, f"{exc.filename}: {reason}" if exc.filename else reason)


def mount_helper(argv: Sequence[str] | None = None) -> NoReturn:
    """Run as the helper that mount(8) calls for this type of file system; exit with its status."""
    from appliance.cli.mount_commands import (
        EXIT_FAILURE,
        EXIT_USAGE,
        parse_mount_call,
        serve_in_background,
    )

    open_missing_streams()
    print_utf8()
    try:
        call = parse_mount_call(sys.argv[1:] if argv is None else argv)
        options = parse_command(call.words)
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
        from appliance.cli.serve_commands import run_mount

        _start_logging(options)
        run_mount(options, when_ready)

    serve_in_background(serve)


def _run(words: Sequence[str]) -> None:
    if words and words[0] not in _ADDERS:
        from appliance.cli.mount_commands import is_mount_call

        if is_mount_call(words):
            mount_helper(words)
    _run_options(parse_command(words))


def _run_virtiofsd(words: Sequence[str]) -> None:
    from appliance.cli import virtiofsd_command

    if "--print-capabilities" in words:
        print_json(virtiofsd_command.CAPABILITIES)
        return
    parser = virtiofsd_parser()
    call = virtiofsd_command.translate(parser, words)
    options = parse_command(call.words, call.defaults)
    if call.descriptor_limit:
        virtiofsd_command.limit_descriptors(call.descriptor_limit)
    if call.is_for_syslog:
        from appliance.cli.system_log import send_errors_to_system_log

        send_errors_to_system_log(virtiofsd_command.PROGRAM)
    options.when_logging = partial(virtiofsd_command.note_ignored, call.ignored)
    _run_options(options)


def _run_options(options: argparse.Namespace) -> None:
    if options.command != "import":  # import starts logging once its processes have been forked
        _start_logging(options)
    if hasattr(options, "when_logging"):
        options.when_logging()
    if not getattr(options, "opens_no_store", False):
        leave_shared_pid(environments(options))
    if options.command in _TRACED:
        _begin_tracing(options)
    options.run(options)
    with writing_output():
        sys.stdout.flush()


def _fail(status: int, reason: Exception | str) -> NoReturn:
    # Bytes of arguments that the locale could not decode are printed as UTF-8 if they are UTF-8.
    text = str(reason).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    for line in text.rstrip("\n").split("\n"):
        print(f"appliance: {line}", file=sys.stderr)
    sys.exit(status)


def _start_logging(options: argparse.Namespace) -> None:
    from appliance.log import configure_logging

    configure_logging(options.log_level, is_json=is_json_log(options))


def _begin_tracing(options: argparse.Namespace) -> None:
    # The process has forked for the last time.
    start_tracing(options.command, __version__)


def parse_command(
    words: Sequence[str], defaults: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Return the options of a command, with the values that are in force.

    Args:
        words: the command and its arguments.
        defaults: by the names of options' attributes, what to use in place of their defaults.

    Raises:
        ConfigError: an argument, a variable, or the configuration file breaks a rule.
    """
    options = command_parser(words[0] if words else "").parse_args(words)
    settle(
        options,
        defaults=defaults,
        reads_file=not getattr(options, "reads_no_file", False),
        when_faulty=getattr(options, "when_config_faulty", None),
    )
    return options


def virtiofsd_parser() -> argparse.ArgumentParser:
    """Return the parser of the program with the command line of virtiofsd."""
    from appliance.cli import virtiofsd_command

    parser = CommandParser(
        prog=virtiofsd_command.PROGRAM,
        usage="%(prog)s [OPTION]... --shared-dir DIR (--socket-path PATH | --fd FD)",
        description="Serve the store to one virtual machine, with the command line of virtiofsd.",
    )
    virtiofsd_command.add_options(parser)
    return parser


def command_parser(command: str = "") -> argparse.ArgumentParser:
    """Return a parser that knows only `command`, or all commands if there is none of that name."""
    parser = GroupsParser(
        prog="appliance",
        usage="%(prog)s COMMAND [OPTION]... [ARGUMENT]...",
        description="Serve the files of a content-addressed store, read-only.",
        epilog="Run `appliance COMMAND --help` for what a command does, and its options.",
    )
    parser.add_argument("--version", action="version", version=f"appliance {__version__}")
    commands = parser.add_subparsers(
        title="commands",
        dest="command",
        required=True,
        metavar="COMMAND",
        prog="appliance",
        parser_class=CommandParser,
    )
    for name in [command] if command in _ADDERS else _ADDERS:
        module, function = _ADDERS[name]
        getattr(import_module(f"appliance.cli.{module}"), function)(commands)
    if command in _ADDERS:
        parser.prog += f" {command}"  # errors refer to the --help of this program name
    return parser


def add_import(commands: "Subparsers") -> None:
    """Add `appliance import`."""
    command = commands.add_parser(
        "import",
        usage="%(prog)s [OPTION]... PATH...",
        help="copy files, directories and symlinks into the store",
        description="Copy each PATH into the store and print its store path once it is durable.",
    )
    command.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        type=path_argument,
        help="a file, directory or symlink; symlinks are not followed",
    )
    command.add_argument(
        "--name",
        help="name the store path NAME instead of by the last component of PATH; takes one PATH",
    )
    command.add_argument(
        "--directory-sizes",
        choices=[dialect.option() for dialect in SizeDialect],
        default=DEFAULT_DIALECT.option(),
        help="how to count the entries below a directory, which its digest depends on: `doubled` "
        "for Tvix and Snix since August 2024, `documented` for older ones and for castore-go; "
        "each refuses the other (default: doubled)",
    )
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_import)


def _run_import(options: argparse.Namespace) -> None:
    from appliance.importer.importer import import_paths

    # An import creates no reference cycles worth collecting, neither now nor at exit.
    gc.disable()
    gc.freeze()
    services = service_addresses(options)
    dialect = SizeDialect[options.directory_sizes.upper()]
    name = _new_name(options)
    with progress_line(progress_form(options)) as progress, ExitStack() as stack:

        def begin() -> None:
            _start_logging(options)
            _begin_tracing(options)
            stack.enter_context(span("import", files=len(options.paths)))

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
            when_begun=begin,
        )
        with closing(imports):
            for imported in imports:
                progress.clear()
                with writing_output():
                    print(imported, flush=True)


def _new_name(options: argparse.Namespace) -> str | None:
    from appliance.nix.store_path import StorePathError, check_new_name

    if options.name is None:
        return None
    if len(options.paths) > 1:
        raise ConfigError(
            f"--name {options.name}: there are {len(options.paths)} PATHs, expected one"
        )
    try:
        return check_new_name(options.name)
    except StorePathError as exc:
        raise ConfigError(f"--name {exc}") from exc
