"""`appliance daemon`: the services of a store over gRPC."""

import argparse
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.key_options import add_signature_options, required_keys, secret_keys
from appliance.cli.listen_options import (
    add_socket_options,
    listen_addresses,
    metrics_socket,
    socket_access,
    tls_files,
)
from appliance.cli.options import add_log_options, add_service_options, service_addresses
from appliance.cli.quantities import min_free_bytes
from appliance.cli.setting_options import add_settings
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_SECTION: Final = "daemon"


def add_daemon(commands: "Subparsers") -> None:
    """Add `appliance daemon`."""
    command = commands.add_parser(
        "daemon",
        usage="%(prog)s [OPTION]...",
        help="serve the store over gRPC",
        description="Serve the store over gRPC, to be read and written, until a signal ends it.",
    )
    serving = command.add_argument_group("serving")
    add_settings(serving, "listen-address", section=_SECTION)
    add_socket_options(serving)
    _add_writing(command.add_argument_group("what clients may put"))
    add_settings(command.add_argument_group("metrics"), "metrics", section=_SECTION)
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_daemon)


def _add_writing(group: "argparse._ArgumentGroup") -> None:
    add_settings(group, "read-only", "check-content", "allow-replace", section=_SECTION)
    add_settings(group, "min-free")
    add_signature_options(group, _SECTION)
    add_settings(group, "sign", section=_SECTION)


def _run_daemon(options: argparse.Namespace) -> None:
    from appliance.rpc.daemon import DaemonConfig, serve

    trusted_keys = required_keys(options)
    _check_read_only(options)
    config = DaemonConfig(
        service_addresses(options),
        listen_addresses(options),
        may_replace_paths=options.allow_replace,
        min_free_bytes=min_free_bytes(options),
        checks_content=options.check_content,
        access=socket_access(options),
        tls=tls_files(options),
        is_readonly=options.read_only,
        trusted_keys=trusted_keys,
        secret_keys=secret_keys(options),
    )
    with metrics_socket(options) as metrics:
        serve(config._replace(metrics=metrics))


def _check_read_only(options: argparse.Namespace) -> None:
    about_writing = {
        "--check-content": options.check_content,
        "--allow-replace": options.allow_replace,
        "--require-signatures": options.require_signatures,
        "--sign": options.sign,
    }
    for option, value in about_writing.items():
        if options.read_only and value:
            raise ConfigError(f"--read-only: cannot be combined with {option}")
