"""What a session process keeps when it is locked down, before it reads from its front-end.

It holds whatever descriptors the front-end sends, and passes them on to its workers. It opens no
file, and has no database. `system.confinement` has the layers and their order.
"""

import fcntl
import signal
from typing import Final

from appliance.protos import control_pb2 as pb
from appliance.system import seccomp
from appliance.system.confinement import COMMON_RULES, Confinement, Surroundings, confine

# fcntl.h.
_F_ADD_SEALS: Final = 1033

SESSION_RULES: Final[tuple[seccomp.Rule, ...]] = (
    *(rule for rule in COMMON_RULES if not isinstance(rule, seccomp.AnyOf) or rule.call != "fcntl"),
    seccomp.AnyOf(
        "fcntl",
        1,
        (
            fcntl.F_GETFD,
            fcntl.F_SETFD,
            fcntl.F_GETFL,
            fcntl.F_SETFL,
            fcntl.F_DUPFD_CLOEXEC,
            _F_ADD_SEALS,
        ),
    ),
    # Inflight buffers that the front-end asks for.
    "memfd_create",
    "ftruncate",
    "pwrite64",
    "recvfrom",  # recv(2)
    "getsockopt",
    "shutdown",
    "dup",
    # Its workers, by their pidfds. It cannot make a pidfd.
    seccomp.AnyOf("pidfd_send_signal", 1, (signal.SIGKILL,)),
)


def lock_down_session(config: pb.Sandbox, surroundings: Surroundings) -> None:
    """Take away from this process all that a session does not need.

    Args:
        config: the user to become, where that is possible.
        surroundings: what `enter_namespaces` returned in the fork server.

    Raises:
        OSError: a layer that this kernel has could not be applied.
    """
    confinement = Confinement(
        kind="session processes",
        rules=SESSION_RULES,
        readable_fd=None,
        may_signal=True,
        parent_pid=None,
    )
    confine(confinement, surroundings, (config.uid, config.gid))
