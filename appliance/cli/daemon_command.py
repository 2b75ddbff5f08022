"""`appliance daemon`: the services of a store over gRPC."""

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.key_options import (
    add_sign_option,
    add_signature_options,
    required_keys,
    secret_keys,
)
from appliance.cli.listen_options import (
    add_metrics_option,
    add_socket_options,
    metrics_socket,
    socket_access,
    tls_files,
)
from appliance.cli.options import add_log_options, add_service_options, service_addresses
from appliance.cli.quantities import add_min_free_option, min_free_bytes
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_DEFAULT_LISTEN: Final = "[::1]:8000"


def add_daemon(commands: "Subparsers") -> None:
    """Add `appliance daemon`."""
    command = commands.add_parser(
        "daemon",
        usage="%(prog)s [OPTION]...",
        help="serve the store over gRPC",
        description="Serve the store over gRPC, to be read and written, until a signal ends it.",
    )
    serving = command.add_argument_group("serving")
    serving.add_argument(
        "-l",
        "--listen-address",
        action="append",
        default=[],
        metavar="ADDR",
        help="listen on ADDR: HOST:PORT, the path of a Unix socket, @NAME for an abstract one, or "
        "sd-listen[:NAME] for those that systemd passes; may be given several times (default: "
        f"{_DEFAULT_LISTEN})",
    )
    add_socket_options(serving)
    _add_writing(command.add_argument_group("what clients may put"))
    add_metrics_option(command.add_argument_group("metrics"), default="none are served")
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_daemon)


def _add_writing(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--read-only", action="store_true", help="nothing: refuse everything that is put"
    )
    group.add_argument(
        "--check-content",
        action="store_true",
        help="before a store path becomes visible, read all of its contents and check them "
        "against its PathInfo",
    )
    group.add_argument(
        "--allow-replace",
        action="store_true",
        help="let clients replace the contents of a store path, which is refused otherwise",
    )
    add_min_free_option(group)
    add_signature_options(group)
    add_sign_option(
        group,
        "sign each store path that is put with the secret key in FILE; implies --check-content, "
        "as --require-signatures does",
    )


def _run_daemon(options: argparse.Namespace) -> None:
    from appliance.rpc.daemon import DaemonConfig, serve
    from appliance.rpc.listen import parse_listen_address

    trusted_keys = required_keys(options)
    _check_read_only(options)
    listen = [
        address
        for text in options.listen_address or [_DEFAULT_LISTEN]
        for address in parse_listen_address(text, os.environ)
    ]
    config = DaemonConfig(
        service_addresses(options),
        listen,
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
