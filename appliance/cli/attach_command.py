"""`appliance attach` and `appliance detach`: the sockets of a supervisor that runs."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from appliance.cli.exported_options import (
    add_exported_options,
    exported_of,
    socket_group,
    socket_mode_of,
)
from appliance.cli.options import (
    add_log_options,
    add_service_options,
    add_state_option,
    service_addresses,
    state_dir,
)
from appliance.cli.output import write_line
from appliance.cli.profile_options import add_profile_options, profiling_of
from appliance.errors import ConfigError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name


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
    socket.add_argument(
        "--socket-group",
        metavar="GROUP",
        help="let members of GROUP (a name or number) connect",
    )
    socket.add_argument(
        "--socket-mode",
        metavar="MODE",
        default="0660",
        help="create the socket with these permissions, in octal (default: 0660)",
    )
    files = command.add_argument_group("files")
    add_exported_options(files)
    add_profile_options(files)
    _add_common(command)
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
    _add_common(command)
    command.set_defaults(run=_run_detach)


def _add_common(command: argparse.ArgumentParser) -> None:
    state = command.add_argument_group("state directory")
    add_state_option(state, "look for the supervisor's control socket in DIR")
    add_service_options(command)
    add_log_options(command)


def _run_attach(options: argparse.Namespace) -> None:
    from appliance.supervisor.attachments import check_attached_name
    from appliance.supervisor.control_socket import ask_supervisor

    exported, profiling = exported_of(options), profiling_of(options)
    path = options.socket_path
    if path == "":
        raise ConfigError("--socket-path: the path is empty")
    group = options.socket_group
    request = {
        "name": check_attached_name(options.name),
        "socket": None if path is None else os.path.abspath(path),  # noqa: PTH100 - not resolved
        "view": exported.view,
        "root": exported.root,
        "gid": None if group is None else socket_group(group),
        "mode": socket_mode_of(options.socket_mode),
        "profile": profiling.play,
        "record_profile": profiling.record,
    }
    answer = ask_supervisor(state_dir(options, service_addresses(options)), {"attach": request})
    write_line(answer["socket"])


def _run_detach(options: argparse.Namespace) -> None:
    from appliance.supervisor.attachments import check_attached_name
    from appliance.supervisor.control_socket import ask_supervisor

    name = check_attached_name(options.name)
    ask_supervisor(state_dir(options, service_addresses(options)), {"detach": name})
