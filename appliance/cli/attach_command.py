"""`appliance attach` and `appliance detach`: the sockets of a supervisor that runs."""

import argparse
import os
from typing import TYPE_CHECKING, Any, Final

from appliance.cli.exported_options import add_exported_options, add_profile_options, exported_of
from appliance.cli.options import add_supervisor_options, service_addresses, state_dir
from appliance.cli.output import write_line
from appliance.cli.setting_options import add_settings
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_CONTROL: Final = "look for the supervisor's control socket in DIR"


def add_attach(commands: "Subparsers") -> None:
    """Add `appliance attach`."""
    command = commands.add_parser(
        "attach",
        usage="%(prog)s [OPTION]... NAME",
        help="have a running supervisor listen for another virtual machine",
        description="Have the `appliance virtiofs --listen-dir` of the state directory listen on a "
        "socket for the virtual machine NAME, and print the socket. The name stays attached until "
        "it is detached, over restarts of the supervisor, too.",
    )
    command.add_argument("name", metavar="NAME", help="what the virtual machine is called")
    socket = command.add_argument_group("socket")
    socket.add_argument(
        "--socket-path",
        metavar="PATH",
        help="listen on the Unix socket at PATH (default: NAME.sock in the --listen-dir of the "
        "supervisor)",
    )
    add_settings(socket, "socket-group", "socket-mode", section="virtiofs")
    files = command.add_argument_group("files")
    add_exported_options(files, is_configured=False)
    add_profile_options(files, is_configured=False)
    add_supervisor_options(command, _CONTROL)
    command.set_defaults(run=_run_attach)


def add_detach(commands: "Subparsers") -> None:
    """Add `appliance detach`."""
    command = commands.add_parser(
        "detach",
        usage="%(prog)s [OPTION]... NAME",
        help="end the session of an attached virtual machine, and remove its socket",
        description="End the session of the virtual machine NAME, if it has one, remove its "
        "socket, and forget the name.",
    )
    command.add_argument("name", metavar="NAME", help="the name it was attached with")
    add_supervisor_options(command, _CONTROL)
    command.set_defaults(run=_run_detach)


def _run_attach(options: argparse.Namespace) -> None:
    from appliance.supervisor.attachments import check_attached_name
    from appliance.supervisor.control_socket import ask_supervisor

    exported = exported_of(options)
    path = options.socket_path
    if path == "":
        raise ConfigError("--socket-path: the path is empty")
    request = {
        "name": check_attached_name(options.name),
        "socket": None if path is None else os.path.abspath(path),  # noqa: PTH100 - not resolved
        "view": exported.view,
        "root": exported.root,
        "gid": options.socket_group,
        "mode": options.socket_mode,
        "profile": options.profile,
        "record_profile": options.record_profile,
    }
    answer = ask_supervisor(state_dir(options, service_addresses(options)), {"attach": request})
    write_line(answer["socket"])


def _run_detach(options: argparse.Namespace) -> None:
    from appliance.supervisor.attachments import check_attached_name
    from appliance.supervisor.control_socket import ask_supervisor

    name = check_attached_name(options.name)
    ask_supervisor(state_dir(options, service_addresses(options)), {"detach": name})
