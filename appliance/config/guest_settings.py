"""Settings of what serves files: `appliance virtiofs` and `appliance mount`."""

import os
from typing import Final

from appliance.bounds import FRONT_ENDS_MAX, QUEUE_SIZE_MAX, REQUEST_QUEUES_MAX
from appliance.config import checks
from appliance.config.kinds import Choice, Flag, Group, Integer, Mode, PathName, Text
from appliance.config.settings import Setting, TableArray

SOCKET_MODE: Final = 0o660
_MAX_MOUNT_WORKERS: Final = 254
_MAX_POLL_US: Final = 1_000_000
_NUM_CPUS: Final = os.cpu_count() or 1
# With one CPU, whoever polls keeps the guest from running.
_POLL_US: Final = 50 if len(os.sched_getaffinity(0)) > 1 else 0

METRICS: Final = Text(checks.check_metrics, written="address")
METRICS_HELP: Final = (
    "serve metrics in the format of OpenMetrics under /metrics on ADDR: the path of a Unix socket, "
    ":PORT of 127.0.0.1, HOST:PORT, or sd-listen[:NAME] for a socket that systemd passes"
)
PASSED_METRICS: Final = "metrics"
"""The name (FileDescriptorName=) of a socket for metrics that systemd passes."""
_METRICS_DEFAULT: Final = (
    f"one that it passes under the name {PASSED_METRICS}, or else `appliance metrics` alone shows "
    "them"
)
_FRONT_ENDS: Final = Integer(minimum=1, maximum=FRONT_ENDS_MAX)
_QUEUES: Final = Integer(minimum=1, maximum=REQUEST_QUEUES_MAX)
_QUEUE_SIZE: Final = Integer(minimum=1, maximum=QUEUE_SIZE_MAX, is_power_of_two=True)
_AS_ABOVE: Final = "as for all sockets"


_SOCKET_FIELDS: Final = (
    Setting(
        section="virtiofs.sockets",
        name="name",
        kind=Text(checks.check_socket_name),
        help="the name of the virtual machine",
    ),
    Setting(
        section="virtiofs.sockets",
        name="path",
        kind=PathName(),
        default_text="NAME.sock in listen-dir",
        help="listen on the Unix socket at this path",
    ),
    Setting(
        section="virtiofs.sockets",
        name="view",
        kind=Text(checks.check_view),
        default_text=_AS_ABOVE,
        help="show the store paths of this view, and nothing else",
    ),
    Setting(
        section="virtiofs.sockets",
        name="root",
        kind=Text(checks.check_root),
        default_text=_AS_ABOVE,
        help="make this store path the root directory",
    ),
    Setting(
        section="virtiofs.sockets",
        name="profile",
        kind=Text(checks.check_profile),
        default_text=_AS_ABOVE,
        help="have what this profile names fetched ahead",
    ),
    Setting(
        section="virtiofs.sockets",
        name="record-profile",
        kind=Text(checks.check_profile),
        default_text=_AS_ABOVE,
        help="record what sessions read first as this profile",
    ),
    Setting(
        section="virtiofs.sockets",
        name="group",
        kind=Group(),
        default_text="socket-group",
        help="let members of this group connect",
    ),
    Setting(
        section="virtiofs.sockets",
        name="mode",
        kind=Mode(),
        default_text="socket-mode",
        help="create the socket with these permissions",
    ),
    Setting(
        section="virtiofs.sockets",
        name="tag",
        kind=Text(checks.check_tag),
        default_text=_AS_ABOVE,
        help="the mount tag for front-ends that ask for it",
    ),
    Setting(
        section="virtiofs.sockets",
        name="num-request-queues",
        kind=_QUEUES,
        default_text=_AS_ABOVE,
        help="offer up to this number of request queues",
    ),
    Setting(
        section="virtiofs.sockets",
        name="queue-size",
        kind=_QUEUE_SIZE,
        default_text=_AS_ABOVE,
        help="let a queue have up to this number of descriptors",
    ),
    Setting(
        section="virtiofs.sockets",
        name="max-front-ends",
        kind=_FRONT_ENDS,
        default_text=_AS_ABOVE,
        help="serve up to this number of front-ends at a time",
    ),
)

VIRTIOFS_SETTINGS: Final = (
    Setting(
        section="virtiofs",
        name="sockets",
        kind=TableArray(fields=_SOCKET_FIELDS, required=("name",), unique=("name", "path")),
        default=[],
        has_option=False,
        is_of_host=True,
        help="the sockets to listen on, each for one virtual machine",
    ),
    Setting(
        section="virtiofs",
        name="listen-dir",
        kind=PathName(),
        metavar="DIR",
        is_of_host=True,
        help="listen for the virtual machines that `appliance attach` names while this command "
        "runs, by default on NAME.sock in DIR, which is made if it is missing",
    ),
    Setting(
        section="virtiofs",
        name="socket-group",
        kind=Group(),
        metavar="GROUP",
        help="let members of GROUP (a name or number) connect to the sockets created here",
    ),
    Setting(
        section="virtiofs",
        name="socket-mode",
        kind=Mode(),
        metavar="MODE",
        default=SOCKET_MODE,
        help="create sockets with these permissions, in octal",
    ),
    Setting(
        section="virtiofs",
        name="max-front-ends",
        kind=_FRONT_ENDS,
        metavar="N",
        default=1,
        help="serve up to N front-ends at a time on each socket, each with a session of its own; "
        "others wait",
    ),
    Setting(
        section="virtiofs",
        name="exit-on-disconnect",
        kind=Flag(),
        default=False,
        help="end when a front-end leaves",
    ),
    Setting(
        section="virtiofs",
        name="keep-sessions",
        kind=Flag(),
        default=False,
        help="when a signal ends this command, leave front-ends that are connected to the next one "
        "that is started with the same sockets and state directory",
    ),
    Setting(
        section="virtiofs",
        name="migration-on-error",
        kind=Choice(words=("abort", "guest-error")),
        default="abort",
        help="refuse a guest that was saved or moved here and had store paths which are missing "
        "(`abort`), or let it go on and find its files there stale (`guest-error`)",
    ),
    Setting(
        section="virtiofs",
        name="pid-file",
        kind=PathName(),
        metavar="PATH",
        is_of_host=True,
        help="write the process id to a file at PATH once the sockets listen, and remove it at "
        "the end",
    ),
    Setting(
        section="virtiofs",
        name="tag",
        kind=Text(checks.check_tag),
        metavar="TAG",
        help="the mount tag to give to front-ends that ask the back-end for it",
    ),
    Setting(
        section="virtiofs",
        name="num-request-queues",
        kind=_QUEUES,
        metavar="N",
        default=min(_NUM_CPUS, REQUEST_QUEUES_MAX),
        default_text="one for each CPU",
        help="offer up to N request queues, each with a worker process",
    ),
    Setting(
        section="virtiofs",
        name="queue-size",
        kind=_QUEUE_SIZE,
        metavar="N",
        default=1024,
        help="let a queue have up to N descriptors, a power of two",
    ),
    Setting(
        section="virtiofs",
        name="poll-us",
        kind=Integer(maximum=_MAX_POLL_US),
        metavar="N",
        default=_POLL_US,
        default_text="50, or 0 with one CPU",
        help="let a worker poll its queue for up to N microseconds before it sleeps, as long as "
        "that saves wake-ups; 0 turns it off",
    ),
    Setting(
        section="virtiofs",
        name="metrics",
        kind=METRICS,
        metavar="ADDR",
        default_text=_METRICS_DEFAULT,
        is_of_host=True,
        help=METRICS_HELP,
    ),
)

MOUNT_SETTINGS: Final = (
    Setting(
        section="mount",
        name="allow-other",
        kind=Flag(),
        default=False,
        help="let other users read the files",
    ),
    Setting(
        section="mount",
        name="noexec",
        kind=Flag(),
        default=False,
        help="do not let programs be executed from the mount",
    ),
    Setting(
        section="mount",
        name="fsname",
        kind=Text(),
        metavar="NAME",
        default="appliance",
        help="show NAME as the source in lists of mounts",
    ),
    Setting(
        section="mount",
        name="passthrough",
        kind=Flag(),
        default=False,
        help="let the kernel read large files by itself (needs Linux 6.9 and root)",
    ),
    Setting(
        section="mount",
        name="threads",
        kind=Integer(minimum=1, maximum=_MAX_MOUNT_WORKERS),
        metavar="N",
        default=min(_NUM_CPUS, _MAX_MOUNT_WORKERS),
        default_text="one for each CPU",
        help="run N worker processes",
    ),
    Setting(
        section="mount",
        name="metrics",
        kind=METRICS,
        metavar="ADDR",
        default_text=_METRICS_DEFAULT,
        help=METRICS_HELP,
    ),
)
