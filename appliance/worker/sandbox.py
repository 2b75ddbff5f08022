"""What a worker keeps when it is locked down, before it reads the first byte that a guest wrote.

A worker parses what guests write. A guest that takes one over, by a fault in the C code or in the
interpreter, should get no further than what the worker itself needs: its descriptors, and reading
blob files. `system.confinement` has the layers and their order.
"""

import os
from typing import Final

from appliance.protos import control_pb2 as pb
from appliance.store.blob_files import BlobFiles
from appliance.system import seccomp
from appliance.system.confinement import COMMON_RULES, Confinement, Surroundings, confine

RING_RULES: Final[tuple[seccomp.Rule, ...]] = COMMON_RULES
# Requests of /dev/fuse come by readv(2); and holes of files are looked for. Passing files through
# to the kernel takes ioctl(2) on that descriptor, which is left to the supervisor.
MOUNT_RULES: Final[tuple[seccomp.Rule, ...]] = (*COMMON_RULES, "readv", "lseek")


def lock_down(
    config: pb.Sandbox,
    surroundings: Surroundings,
    files: BlobFiles,
    rules: tuple[seccomp.Rule, ...],
) -> None:
    """Take away from this process all that serving does not need.

    Args:
        config: the user to become, where that is possible.
        surroundings: what `enter_namespaces` returned in the fork server.
        files: the blob files of the store, which can be read after this, too.
        rules: `RING_RULES` or `MOUNT_RULES`. A worker of a mount dies with its fork server; one of
            a queue goes on, and its session process ends it.

    Raises:
        OSError: a layer that this kernel has could not be applied.
    """
    confinement = Confinement(
        kind="workers",
        rules=rules,
        readable_fd=files.enter_blobs(),
        may_signal=False,
        parent_pid=os.getppid() if rules is MOUNT_RULES else None,
    )
    confine(confinement, surroundings, (config.uid, config.gid))
