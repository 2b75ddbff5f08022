"""How long a Debian takes to boot from a store far away, with a profile and without one.

`make debian-profile`. Not part of the suite: debootstrap downloads some 60 MB, and each boot takes
half a minute. `test_guest_profiles.py` is the short form. In user-mode Linux, most of such a boot
is computing, which a boot from a full cache takes, too; so the time beyond that is compared.
"""

import os
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final, NamedTuple

from debian_root import BOOT_S, prepared_root
from vmharness.served import TAG, boot_guest

from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.hosts import Network
from tests.fakes.running_command import APPLIANCE
from tests.fakes.slow_link import SlowLink

ANSWER_S: Final = 300.0
ROUNDS: Final = int(os.environ.get("TEST_BOOT_ROUNDS", "3"))
# 20 ms there and back, 50 Mbit/s.
LINK: Final = {"delay_s": 0.01, "bytes_per_s": 50e6 / 8, "loss": 0.0}
DAEMON_PORT: Final = 7000
LINK_PORT: Final = 7001
# Where the profile is left, for example as the trace of a simulation.
KEPT: Final = os.environ.get("TEST_PROFILE_TO")


class Boot(NamedTuple):
    """What a boot took, and the bytes that crossed the link for it."""

    seconds: float
    crossed: int


class Far:
    """A Debian root in a store behind a slow link; host `a` of the network boots from it."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self._directory = directory
        store = f"lmdb://{directory}/store"
        (self._name,) = import_tree(store, prepared_root(directory / "root"))
        self._network = stack.enter_context(Network("store", "a"))
        host = self._network.hosts["store"]
        address, listen = (f"{host.address}:{port}" for port in (DAEMON_PORT, LINK_PORT))
        stack.enter_context(
            DaemonProcess(store, directory / "daemon", listen=[address], prefix=host.prefix)
        )
        self._link = stack.enter_context(SlowLink(listen, address, prefix=host.prefix, **LINK))
        self._uri = f"grpc+http://{listen}"

    def boot(self, run: str, *options: str) -> Boot:
        """Boot with an empty cache in a state directory called `run`, up to multi-user.target."""
        directory = self._directory / run
        directory.mkdir(exist_ok=True)
        host = self._network.hosts["a"]
        before = self._link.bytes_to(host.address)
        with ApplianceProcess(
            self._uri,
            directory,
            f"--state-dir={self.state(run)}",
            f"--root={self._name}",
            f"--tag={TAG}",
            "--num-request-queues=1",
            *options,
            prefix=host.prefix,
        ) as process:
            began_s = time.monotonic()
            with boot_guest(
                "uml", process.sockets, directory, root=TAG, boot_deadline_s=BOOT_S
            ) as guest:
                guest.run("systemctl is-system-running --wait", ANSWER_S)
                seconds = time.monotonic() - began_s
                assert guest.check("systemctl is-active multi-user.target", ANSWER_S) == b"active\n"
                (session,) = process.status()
            print(run, f"{seconds:.1f} s", session["wants"])
        return Boot(seconds, self._link.bytes_to(host.address) - before)

    def profile(self, command: str, run: str, *words: str, data: bytes = b"") -> bytes:
        """Run a command of `appliance profile` on a state directory."""
        store = ["--store", self._uri, "--state-dir", os.fspath(self.state(run))]
        return subprocess.run(
            [*APPLIANCE, "profile", command, *store, *words],
            check=True,
            input=data,
            stdout=subprocess.PIPE,
        ).stdout

    def state(self, run: str) -> Path:
        return self._directory / run / "state"


def test_a_debian_waits_half_as_long_for_what_it_reads(tmp_path: Path) -> None:
    with ExitStack() as stack:
        far = Far(tmp_path, stack)
        far.boot("recorded", "--record-profile=boot")
        exported = far.profile("export", "recorded", "boot")
        print(far.profile("show", "recorded", "boot").decode())
        if KEPT:
            Path(KEPT).write_bytes(exported)
        without, with_it = [], []
        for number in range(ROUNDS):
            far.profile("import", f"with{number}", "boot", "-", data=exported)
            without.append(far.boot(f"without{number}"))
            with_it.append(far.boot(f"with{number}", "--profile=boot"))
            print(f"without {without[-1]}, with {with_it[-1]}, load {os.getloadavg()[0]:.1f}")
        warm = [far.boot("recorded") for _ in range(ROUNDS)]
    medians = [statistics.median(boot.seconds for boot in boots) for boots in (without, with_it)]
    at_best = statistics.median(boot.seconds for boot in warm)
    print(f"medians: {medians[0]:.1f} s without, {medians[1]:.1f} s with; cached {at_best:.1f} s")
    without_s, with_s = (median - at_best for median in medians)
    print(f"beyond that: {without_s:.1f} s without, {with_s:.1f} s with")
    # All that is read takes 4 s through this link, so there is no less than that to wait for.
    assert with_s <= 0.6 * without_s
