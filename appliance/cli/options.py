"""Options that several commands share, and what they and the environment say about services.

An option takes precedence over its environment variable, and both of a service over those of the
store. An empty variable counts as unset; an empty option is an error.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from appliance.cli.terminal import ProgressForm
from appliance.errors import ConfigError
from appliance.services.addresses import (
    LmdbAddress,
    ServiceAddress,
    ServiceAddresses,
    parse_service_uri,
)

# Of the log, and of progress, if a command is to be quiet.
_QUIET_LEVEL: Final = "WARNING"
_DEFAULT_LEVEL: Final = "INFO"
_KINDS: Final = ("blob", "directory", "path-info")


def path_argument(text: str) -> Path:
    """Return an argument as a path; an empty one, which Path takes for ".", is refused."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def add_service_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where the store is."""
    store = parser.add_argument_group(
        "store",
        "A URI is lmdb:///DIR (a directory of this machine), grpc+unix:/SOCKET, "
        "grpc+http://HOST:PORT, grpc+https://HOST:PORT, objectstore+s3://BUCKET/PREFIX (or gs, az "
        "in place of s3), objectstore+https://HOST/PREFIX (which can only be read), "
        "objectstore+file:///DIR, or memory: (empty at first, and gone when the command ends). "
        "Options of an object store follow a question mark, such as region=NAME and endpoint=URL, "
        "or are in the variables of its vendor's tools, such as AWS_ACCESS_KEY_ID. Behind the "
        "address of a gRPC service, ?wait-connect=1 connects at once; for "
        "grpc+https, tls-ca-cert-path=FILE, tls-client-cert-path=FILE and tls-client-key-path=FILE "
        "name what is trusted and what is shown (parameters are joined by &).",
    )
    store.add_argument(
        "--store",
        metavar="URI",
        help="use the store at this address (default: APPLIANCE_STORE, or else the directory "
        "/var/lib/appliance/store for root, ~/.local/state/appliance/store for others)",
    )
    services = parser.add_argument_group("services (each overrides --store)")
    for kind in _KINDS:
        services.add_argument(
            f"--{kind}-service-addr",
            metavar="URI",
            help=f"address of the {kind} service (default: {_variable(kind)})",
        )


def add_state_option(parser: argparse._ActionsContainer, use: str) -> None:
    """Add the option that names the state directory DIR; `use` says what the command does in it."""
    parser.add_argument(
        "--state-dir",
        metavar="DIR",
        help=f"{use} (default: APPLIANCE_STATE_DIR, or else a directory beside the store)",
    )


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the log, which every command has."""
    group = parser.add_argument_group("log, on standard error")
    group.add_argument(
        "-q",
        "--quiet",
        dest="log_level",
        action="store_const",
        const=_QUIET_LEVEL,
        default=_DEFAULT_LEVEL,  # of the options for one value, the first has to state it
        help="log only warnings and errors, and show no progress",
    )
    group.add_argument(
        "-v",
        "--verbose",
        dest="log_level",
        action="store_const",
        const="DEBUG",
        default=_DEFAULT_LEVEL,
        help="log events of all levels",
    )
    group.add_argument(
        "--log-level",
        type=str.upper,
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default=_DEFAULT_LEVEL,
        metavar="LEVEL",
        help="log events of this level and above: debug, info, warning or error (default: info)",
    )
    group.add_argument(
        "--log-format",
        choices=("plain", "json"),
        default="plain",
        help="write each event as a line of text or as a line of JSON (default: plain)",
    )


def progress_form(options: argparse.Namespace) -> ProgressForm:
    """Return how a command with `options` shows progress."""
    if options.log_level in {_QUIET_LEVEL, "ERROR"}:
        return ProgressForm.NONE
    is_json = is_json_log(options) or getattr(options, "json", False)
    return ProgressForm.JSON if is_json else ProgressForm.PLAIN


def is_json_log(options: argparse.Namespace) -> bool:
    """Return whether `options` ask for a log in JSON."""
    return bool(options.log_format == "json")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that asks for the output of a command as JSON."""
    parser.add_argument("--json", action="store_true", help="print the output as JSON")


def service_addresses(
    options: argparse.Namespace, environ: Mapping[str, str] = os.environ
) -> ServiceAddresses:
    """Return the addresses of the three services.

    Raises:
        ConfigError: an address is not valid; the text names the option or variable it came from.
    """
    return ServiceAddresses(*(_address(kind, options, environ) for kind in _KINDS))


def target_addresses(options: argparse.Namespace) -> ServiceAddresses:
    """Return the addresses of the three services in the one store that --to names.

    Raises:
        ConfigError: it is not valid.
    """
    try:
        address = parse_service_uri(options.copy_target)
    except ConfigError as exc:
        raise ConfigError(f"--to: {exc}") from exc
    if isinstance(address, LmdbAddress):
        _checked_directory(f"--to {options.copy_target}", address.path)
    return ServiceAddresses(address, address, address)


def environments(options: argparse.Namespace) -> list[Path]:
    """Return the directories of all LMDB environments that a command with `options` may open.

    Raises:
        ConfigError: an address or the state directory is not valid, see `service_addresses` and
            `state_dir`.
    """
    if not hasattr(options, "blob_service_addr"):
        return []
    addresses = service_addresses(options)
    opened = [*addresses]
    if getattr(options, "copy_target", None) is not None:
        opened += target_addresses(options)
    found = {address.path for address in opened if isinstance(address, LmdbAddress)}
    if hasattr(options, "state_dir"):
        found.update(state_dir(options, addresses).glob("cache/v*"))
    return sorted(found)


def state_dir(
    options: argparse.Namespace, services: ServiceAddresses, environ: Mapping[str, str] = os.environ
) -> Path:
    """Return the directory of the cache and the control sockets; it may not exist yet.

    Raises:
        ConfigError: the path is not a directory and cannot become one; the text names the option
            or variable it came from.
    """
    given = {
        "--state-dir": options.state_dir,
        "APPLIANCE_STATE_DIR": environ.get("APPLIANCE_STATE_DIR"),
    }
    for source, value in given.items():
        if value == "" and _is_option(source):
            raise ConfigError(f"{source}: the path is empty")
        if value:
            return _checked_directory(f"{source} {value}", Path(value))
    return default_state_dir(services)


def default_state_dir(services: ServiceAddresses, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the state directory that is used when none is given.

    It lies beside the store if all services are in one local store. Otherwise, or if this process
    may not write there, it lies beside the default store, under a name made from the addresses.
    """
    store = services.one_store()
    if store is not None:
        beside = store.with_name(store.name + ".state")
        if _is_writable(beside):
            return beside
    import hashlib

    name = hashlib.sha256(services.canonical().encode()).hexdigest()[:16]
    return default_store(environ).with_name(f"remote-{name}.state")


def _is_writable(path: Path) -> bool:
    # If `path` does not exist yet, the nearest existing ancestor decides.
    there = next(above for above in (path, *path.parents) if os.path.lexists(above))
    return os.access(there, os.W_OK)


def default_store(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the path of the store that is used when none is given."""
    if os.geteuid() == 0:
        return Path("/var/lib/appliance/store")
    state_home = environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state_home) / "appliance" / "store"


def _address(kind: str, options: argparse.Namespace, environ: Mapping[str, str]) -> ServiceAddress:
    given = {
        f"--{kind}-service-addr": getattr(options, f"{kind.replace('-', '_')}_service_addr"),
        _variable(kind): environ.get(_variable(kind)),
        "--store": options.store,
        "APPLIANCE_STORE": environ.get("APPLIANCE_STORE"),
    }
    for source, uri in given.items():
        if uri or (uri == "" and _is_option(source)):
            try:
                address = parse_service_uri(uri)
            except ConfigError as exc:
                raise ConfigError(f"{source}: {exc}") from exc
            if isinstance(address, LmdbAddress):
                _checked_directory(f"{source} {uri}", address.path)
            return address
    return LmdbAddress(default_store(environ))


def _is_option(source: str) -> bool:
    return source.startswith("--")


def _checked_directory(given: str, path: Path) -> Path:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as exc:  # py-lmdb takes only UTF-8
        raise ConfigError(f"{given}: the path is not UTF-8") from exc
    # Missing directories can be created if the nearest existing ancestor is a directory.
    for there in (path, *path.absolute().parents):
        if os.path.lexists(there):
            if not there.is_dir():
                raise ConfigError(f"{given}: {there} is not a directory")
            break
    return path


def _variable(kind: str) -> str:
    return f"{kind.replace('-', '_').upper()}_SERVICE_ADDR"
