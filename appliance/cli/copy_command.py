"""`appliance copy`: copies store paths, with their metadata, from Nix or from other services."""

import argparse
import os
import sys
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.cli.copy_report import CopyReport
from appliance.cli.key_options import add_trusted_keys_option
from appliance.cli.options import (
    add_json_option,
    add_log_options,
    add_service_options,
    progress_form,
    service_addresses,
    target_addresses,
)
from appliance.cli.terminal import progress_line
from appliance.errors import ApplianceError, ConfigError, PathInfoError
from appliance.services.addresses import ServiceAddresses

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from appliance.copier.claim_checks import CheckClaim
    from appliance.copier.copier import CopyOutcome, CopySource
    from appliance.copier.path_info_json import Claims
    from appliance.copier.source_address import SourceAddress
    from appliance.copier.target import CopyTarget
    from appliance.nix.store_path import StorePath
    from appliance.nix.trusted_keys import TrustedKeys
    from appliance.store.writer import AsyncStore

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

# In place of the name of a file.
STANDARD_INPUT: Final = "-"

# The Nix store, by its database.
_THIS_MACHINE: Final = "local"
_ATTRIBUTES_VARIABLE: Final = "NIX_ATTRS_JSON_FILE"


def add_copy(commands: "Subparsers") -> None:
    """Add the command."""
    command = commands.add_parser(
        "copy",
        usage="%(prog)s [OPTION]... [PATH]...",
        help="copy store paths from Nix, a binary cache or another store",
        description="Copy each PATH into the store, with its name, references, deriver, content "
        "address and signatures, and print it once it is durable. Paths that the store has "
        "already are skipped. A path that cannot be copied does not keep others from being "
        "copied, unless they refer to it.",
    )
    command.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="a store path, a symlink into a store, or a file with the structured attributes of a "
        "derivation that has an exportReferencesGraph (without any PATH: the file in "
        f"{_ATTRIBUTES_VARIABLE})",
    )
    command.add_argument(
        "-r",
        "--recursive",
        action="store_true",
        help="copy the closures of the paths; otherwise their references must be there already",
    )
    command.add_argument(
        "--stdin", action="store_true", help="also read store paths from standard input, one a line"
    )
    command.add_argument(
        "--path-info-json",
        metavar="FILE",
        help="copy the paths listed by `nix path-info --json` in FILE, or - for standard input; "
        "their trees are read from the directory of the Nix store",
    )
    command.add_argument(
        "--import",
        dest="export",
        metavar="FILE",
        help="copy the output of `nix-store --export` in FILE, or - for standard input",
    )
    add_dialect_option(command)
    add_json_option(command)
    _add_source_options(command)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_copy)


def _add_source_options(command: argparse.ArgumentParser) -> None:
    source = command.add_argument_group("source")
    source.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="copy from: local (the Nix store of this machine, by its database), local?root=DIR "
        "(the one below DIR), file:///DIR or http(s)://HOST (a binary cache, optionally with "
        "?trusted-public-keys=KEYS), or the URI of another store (default: local, or with --to "
        "the store)",
    )
    source.add_argument(
        "--to",
        dest="copy_target",
        metavar="URI",
        help="copy into the store at this address in place of --store; from another store, the "
        "closures of the paths, and of their contents what is not there",
    )
    add_trusted_keys_option(
        source,
        "public keys, NAME:BASE64, separated by spaces; each path of a binary cache must be "
        "signed by one of them or have a content address",
    )
    source.add_argument(
        "--no-check-sigs",
        action="store_true",
        help="accept paths from a binary cache without a signature",
    )


def add_dialect_option(command: argparse.ArgumentParser) -> None:
    """Add the option that says how directories count their entries."""
    command.add_argument(
        "--directory-sizes",
        choices=[dialect.option() for dialect in SizeDialect],
        default=DEFAULT_DIALECT.option(),
        help="how to count the entries below a directory, see `appliance import --help` "
        "(default: doubled)",
    )


def _run_copy(options: argparse.Namespace) -> None:
    from appliance.copier.source_address import parse_source

    if options.copy_target is not None and options.source is None:
        source: SourceAddress = service_addresses(options)
    else:
        options.source = options.source or _THIS_MACHINE
        try:
            source = parse_source(options.source)
        except ConfigError as exc:
            raise ConfigError(f"--from {exc}") from exc
    if options.copy_target is not None and isinstance(source, ServiceAddresses):
        _copy_between(options, source)
        return
    run = _Copy(options, source)
    if options.export is not None:
        _check_alone(options, "--import")
        with input_file(options.export, "--import") as file:
            run.run(lambda target: run.imported(target, file))
        return
    claims = _listed_claims(options)
    if claims is not None:
        run.run(lambda target: run.copied(target, list(claims), claims))
        return
    paths = _given_paths(options, source)
    run.run(lambda target: run.copied(target, paths, None))


def _copy_between(options: argparse.Namespace, source: ServiceAddresses) -> None:
    from appliance.cli.store_copy_command import copy_between

    for option, is_given in (
        ("--import", options.export is not None),
        ("--path-info-json", options.path_info_json is not None),
    ):
        if is_given:
            raise ConfigError(f"{option}: cannot be combined with --to from another store")
    copy_between(options, source, _target(options), _given_paths(options, source))


def _target(options: argparse.Namespace) -> ServiceAddresses:
    return service_addresses(options) if options.copy_target is None else target_addresses(options)


class _Copy:
    """One run of the command."""

    def __init__(self, options: argparse.Namespace, source: "SourceAddress") -> None:
        from appliance.copier.ingest import CopyProgress

        self._options = options
        self._source = source
        self._keys = self._trusted_keys()
        self._progress: CopyProgress = CopyProgress()
        self._stores: dict[Path, AsyncStore] = {}
        self._stack = ExitStack()
        self._report: CopyReport

    def run(self, outcomes: "Callable[[CopyTarget], Generator[CopyOutcome, None, None]]") -> None:
        """Open the target, consume `outcomes`, and print the result for each path.

        Raises:
            StoreError: some paths were refused: one line for each; or the copy ended early.
        """
        from appliance.copier.target import open_target

        dialect = SizeDialect[self._options.directory_sizes.upper()]
        with self._stack as stack:
            line = stack.enter_context(progress_line(progress_form(self._options)))
            self._report = report = CopyReport(line, is_json=self._options.json)
            addresses = _target(self._options)
            target = stack.enter_context(open_target(addresses, dialect, self._stores))
            try:
                # Closed before the target, because the threads of the copy use that.
                with closing(outcomes(target)) as found:
                    for outcome in found:
                        report.take(outcome)
            except (ConfigError, BrokenPipeError):
                raise
            except ApplianceError as exc:
                report.cause = exc
        report.conclude(
            f"{report.num_copied} paths, {report.megabytes_in_time(report.num_bytes)}; "
            f"{report.num_present} were there already"
        )

    def copied(
        self, target: "CopyTarget", paths: "Sequence[StorePath]", claims: "Claims | None"
    ) -> "Generator[CopyOutcome, None, None]":
        """Copy `paths`; `claims` describes them, if given, and the source has their trees."""
        from appliance.copier.copier import ClosureCopy

        source = self._open_source(claims)
        copy = ClosureCopy(
            source,
            target,
            self._check(source),
            is_recursive=self._options.recursive,
            progress=self._progress,
            when_waiting=self._show,
        )
        yield from copy.run(paths)

    def imported(
        self, target: "CopyTarget", file: BinaryIO
    ) -> "Generator[CopyOutcome, None, None]":
        """Copy the output of `nix-store --export` in `file`."""
        from appliance.copier.copier import PathCommitter
        from appliance.copier.export_stream import import_export

        def read(size: int) -> bytes:
            self._show_counts()
            return file.read(size)

        yield from import_export(read, target, PathCommitter(target, self._progress))

    def _open_source(self, claims: "Claims | None") -> "CopySource":
        from appliance.copier.nix_store import ListedPaths, NixStore, NixStorePlace
        from appliance.copier.source_address import CacheAddress

        match self._source:
            case NixStorePlace() as place:
                if claims is not None:
                    return ListedPaths(place.directory, claims)
                return self._stack.enter_context(closing(NixStore(place)))
            case CacheAddress() as address:
                from appliance.copier.infused_cache import open_cache

                target = _target(self._options)
                return self._stack.enter_context(open_cache(address, target, self._stores))
            case addresses:
                from appliance.copier.service_source import open_service_source

                return self._stack.enter_context(open_service_source(addresses, self._stores))

    def _check(self, source: "CopySource") -> "CheckClaim":
        from appliance.copier.claim_checks import trust_all

        if not source.needs_signatures or self._keys is None:
            return trust_all
        return self._keys.check

    def _trusted_keys(self) -> "TrustedKeys | None":
        from appliance.copier.source_address import CacheAddress
        from appliance.nix.trusted_keys import parse_keys

        if not isinstance(self._source, CacheAddress) or self._options.no_check_sigs:
            return None
        texts = [*self._options.trusted_public_keys, *self._source.keys]
        return parse_keys(texts, "--trusted-public-keys")

    def _show(self, num_done: int, num_all: int) -> None:
        progress = self._progress
        self._report.line.update(
            num_files=progress.num_files,
            num_bytes=progress.num_bytes,
            path=f"{num_done}/{num_all} {progress.path}",
            fraction=progress.fraction(),
        )

    def _show_counts(self) -> None:
        self._report.line.update(
            num_files=self._progress.num_files, num_bytes=self._progress.num_bytes, path=""
        )


# --- The paths to copy ---


def _check_alone(options: argparse.Namespace, option: str) -> None:
    others = {
        "PATH": options.paths,
        "--stdin": options.stdin,
        "--import": options.export is not None,
        "--path-info-json": options.path_info_json is not None,
    }
    given = [name for name, value in others.items() if value and name != option]
    if given:
        raise ConfigError(f"{option}: cannot be combined with {given[0]}")


def _listed_claims(options: argparse.Namespace) -> "Claims | None":
    """Return the claims of a list in JSON, or None if there is no such list."""
    from appliance.copier.nix_store import NixStorePlace
    from appliance.copier.path_info_json import parse_path_infos
    from appliance.copier.source_address import parse_source

    if options.path_info_json is not None:
        _check_alone(options, "--path-info-json")
        option, name = "--path-info-json", options.path_info_json
    else:
        option, name = "", _attributes_file(options)
        if name is None:
            return None
    if not isinstance(parse_source(options.source), NixStorePlace):
        raise ConfigError(f"{name}: a list of paths needs --from local or local?root=DIR")
    with input_file(name, option) as file:
        text = file.read()
    try:
        return parse_path_infos(text)
    except PathInfoError as exc:
        raise ConfigError(f"{option} {name}: {exc}".strip()) from exc


def _attributes_file(options: argparse.Namespace) -> str | None:
    if not options.paths and not options.stdin:
        return os.environ.get(_ATTRIBUTES_VARIABLE) or None
    if len(options.paths) == 1 and not options.stdin and _is_plain_file(options.paths[0]):
        return str(options.paths[0])
    return None


def _is_plain_file(text: str) -> bool:
    """Whether `text` names a file that is not in a store."""
    from appliance.nix.store_path import STORE_DIR, StorePath

    path = Path(text)
    if not path.is_file() or path.is_symlink() or f"{STORE_DIR}/" in str(path.resolve()):
        return False
    try:
        StorePath.parse(text)
    except PathInfoError:
        return True
    return False


def _given_paths(options: argparse.Namespace, source: "SourceAddress") -> "list[StorePath]":
    texts = list(options.paths)
    if options.stdin:
        texts += [line for line in map(str.strip, sys.stdin) if line]
    elif not texts:
        raise ConfigError("no PATH was given (see appliance copy --help)")
    return [_store_path(text, source) for text in texts]


def _store_path(text: str, source: "SourceAddress") -> "StorePath":
    """Return the store path that `text` names, is below, or points into as a symlink."""
    from appliance.copier.nix_store import NixStorePlace, logical_path
    from appliance.nix.store_path import STORE_DIR
    from appliance.services.paths_in_store import parse_path

    directory = source.directory if isinstance(source, NixStorePlace) else Path(STORE_DIR)
    found = text
    if not text.startswith(f"{STORE_DIR}/") and os.path.lexists(text):
        found = os.path.realpath(text)
    return parse_path(logical_path(found, directory))[0]


@contextmanager
def input_file(name: str, option: str) -> "Iterator[BinaryIO]":
    """Open a file for reading inside the block, or standard input if the name is `-`.

    Raises:
        ConfigError: it cannot be opened; the text names `option` too.
    """
    if name == STANDARD_INPUT:
        yield sys.stdin.buffer
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 - only its opening is what may fail here
    except OSError as exc:
        raise ConfigError(f"{option} {name}: {exc.strerror}".strip()) from exc
    with file:
        yield file
