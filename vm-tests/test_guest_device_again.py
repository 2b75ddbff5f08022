"""QEMU's device_del and device_add on a kept chardev: the guest mounts and reads each time.

`make device-again` does it 20 times, with two guest kernels, and with a newer QEMU too.
"""

import os
from pathlib import Path

import pytest
from vmharness import kernel, newer_debian, qemu, tree
from vmharness.monitor import Monitor
from vmharness.served import NEW_SERIES, TAG
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import ApplianceProcess, import_tree

ANSWER_S = 60.0
ROUNDS = int(os.environ.get("TEST_DEVICE_ROUNDS", "2"))
# Series of the guest's kernel, and whether QEMU is that of a newer Debian.
MACHINES = [(NEW_SERIES, False)]
if "TEST_DEVICE_ROUNDS" in os.environ:
    MACHINES += [("", False), (NEW_SERIES, True)]


@pytest.mark.parametrize(("series", "is_newer"), MACHINES)
def test_a_device_that_is_removed_and_added_again_is_served(
    series: str,
    is_newer: bool,  # noqa: FBT001 -- pytest passes it by name
    tmp_path: Path,
) -> None:
    program = newer_debian.qemu() if is_newer else qemu.PROGRAM
    print(newer_debian.version_of(program))
    source = tmp_path / "tree"
    source.mkdir()
    for number in range(20):
        (source / str(number)).write_bytes(os.urandom(number * 5000))
    (name,) = import_tree(tmp_path / "store", source)
    expected = tree.tree_digest(tree.records(source, is_normalised=True))
    monitor_path = tmp_path / "monitor"
    with ApplianceProcess(tmp_path / "store", tmp_path, "--num-request-queues=1") as appliance:
        device = qemu.FsDevice(appliance.sockets[0], TAG)
        with (
            qemu.boot(
                [device],
                tmp_path,
                kernel=kernel.qemu_kernel(series),
                program=program,
                monitor=monitor_path,
            ) as guest,
            Monitor(monitor_path, ANSWER_S) as monitor,
        ):
            pids = set()
            for round_ in range(ROUNDS + 1):
                # The guest takes a moment to find a device that was added.
                mount = f"mount -t virtiofs -o ro {TAG} /mnt"
                guest.check(f"until {mount} 2>/dev/null; do sleep 0.1; done", ANSWER_S)
                digest = guest.check(f"probe tree-digest -n read /mnt/{name}", ANSWER_S)
                assert TreeDigest.parse(digest) == expected
                (session,) = appliance.status()
                assert session["requests"]["INIT"] == round_ + 1
                pids.add(session["pid"])
                guest.check("umount /mnt", ANSWER_S)
                if round_ < ROUNDS:
                    monitor.execute("device_del", id="device0")
                    monitor.wait_for("DEVICE_DELETED", device="device0")
                    monitor.execute(
                        "device_add",
                        driver="vhost-user-fs-pci",
                        id="device0",
                        bus="port0",
                        chardev="fs0",
                        tag=TAG,
                    )
            assert len(pids) == 1, "the connection stays, and its session process"
