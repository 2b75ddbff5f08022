"""Options that several commands share, and what they and other sources say about services.

The address of a service takes precedence over that of the store, unless it comes from the
configuration file and the other does not. An empty option is an error.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from appliance.cli.setting_options import add_config_option, add_settings
from appliance.cli.terminal import ProgressForm
from appliance.config.resolution import ValueSource, label_of, source_of
from appliance.errors import ConfigError
from appliance.services.addresses import (
    LmdbAddress,
    ServiceAddress,
    ServiceAddresses,
    parse_service_uri,
)

# Of the log, and of progress, if a command is to be quiet.
_QUIET_LEVEL: Final = "WARNING"
_KINDS: Final = ("blob", "directory", "path-info")
# In the order in which they count.
_SOURCES: Final = tuple(ValueSource)


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
    add_settings(store, "store")
    services = parser.add_argument_group("services (each overrides --store)")
    add_settings(services, *(f"{kind}-service-addr" for kind in _KINDS))


def add_state_option(parser: argparse._ActionsContainer, use: str) -> None:
    """Add the option that names the state directory DIR; `use` says what the command does in it."""
    add_settings(parser, "state-dir", use=use)


def add_supervisor_options(command: argparse.ArgumentParser, use: str) -> None:
    """Add the options of a command about a store and its state directory, used as `use` says."""
    add_state_option(command.add_argument_group("state directory"), use)
    add_service_options(command)
    add_log_options(command)


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has: of the log, and the configuration file."""
    add_config_option(parser.add_argument_group("configuration"))
    group = parser.add_argument_group("log, on standard error")
    group.add_argument(
        "-q",
        "--quiet",
        dest="log_level",
        action="store_const",
        const=_QUIET_LEVEL,
        help="log only warnings and errors, and show no progress",
    )
    group.add_argument(
        "-v",
        "--verbose",
        dest="log_level",
        action="store_const",
        const="DEBUG",
        help="log events of all levels",
    )
    add_settings(group, "log-level", "log-format")


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


def service_addresses(options: argparse.Namespace) -> ServiceAddresses:
    """Return the addresses of the three services.

    Raises:
        ConfigError: an address is not valid; the text says where it came from.
    """
    return ServiceAddresses(*(_address(f"{kind}-service-addr", options) for kind in _KINDS))


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


def state_dir(options: argparse.Namespace, services: ServiceAddresses) -> Path:
    """Return the directory of the cache and the control sockets; it may not exist yet.

    Raises:
        ConfigError: the path is not a directory and cannot become one; the text says where it came
            from.
    """
    given: Path | None = options.state_dir
    if given is None:
        return default_state_dir(services)
    return _checked_directory(f"{label_of(options, 'state_dir')} {given}", given)


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


def _address(name: str, options: argparse.Namespace) -> ServiceAddress:
    dests = [name.replace("-", "_"), "store"]
    # The sort is stable: of two from the same kind of place, the service comes before the store.
    for dest in sorted(dests, key=lambda dest: _SOURCES.index(source_of(options, dest))):
        uri = getattr(options, dest)
        if uri is not None:
            label = label_of(options, dest)
            try:
                address = parse_service_uri(uri)
            except ConfigError as exc:
                raise ConfigError(f"{label}: {exc}") from exc
            if isinstance(address, LmdbAddress):
                _checked_directory(f"{label} {uri}", address.path)
            return address
    return LmdbAddress(default_store())


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
