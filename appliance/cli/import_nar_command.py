"""`appliance import-nar`: imports a NAR as `import` would import its tree."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance.castore.size_dialect import SizeDialect
from appliance.cli.copy_command import STANDARD_INPUT, add_dialect_option, input_file
from appliance.cli.options import (
    add_log_options,
    add_service_options,
    progress_form,
    service_addresses,
)
from appliance.cli.output import write_line
from appliance.cli.terminal import progress_line
from appliance.errors import ConfigError, PathInfoError, StoreError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


def add_import_nar(commands: "Subparsers") -> None:
    """Add the command."""
    command = commands.add_parser(
        "import-nar",
        usage="%(prog)s [OPTION]... FILE",
        help="import the tree in a NAR",
        description="Import the NAR in FILE and print its store path, which is the same as if "
        "`appliance import` had imported the tree.",
    )
    command.add_argument("file", metavar="FILE", help="the NAR, or - for standard input")
    command.add_argument(
        "--name", help="name of the store path (default: the name of FILE, without .nar)"
    )
    add_dialect_option(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_import_nar)


def _run_import_nar(options: argparse.Namespace) -> None:
    from appliance.copier.copier import CopyStatus, PathCommitter
    from appliance.copier.ingest import CopyProgress
    from appliance.copier.nar_import import import_nar
    from appliance.copier.target import open_target
    from appliance.nix.store_path import check_new_name

    if options.name is None and options.file == STANDARD_INPUT:
        raise ConfigError("--name: is required for standard input")
    try:
        name = check_new_name(options.name or Path(options.file).name.removesuffix(".nar"))
    except PathInfoError as exc:
        raise ConfigError(f"--name {exc}") from exc
    progress = CopyProgress()
    dialect = SizeDialect[options.directory_sizes.upper()]
    with input_file(options.file, "") as file, progress_line(progress_form(options)) as line:

        def read(size: int) -> bytes:
            line.update(num_files=progress.num_files, num_bytes=progress.num_bytes, path="")
            return file.read(size)

        with open_target(service_addresses(options), dialect, {}) as target:
            outcome = import_nar(read, name, PathCommitter(target, progress))
    if outcome.status is CopyStatus.REFUSED:
        raise StoreError(outcome.reason)
    write_line(outcome.path.absolute())
