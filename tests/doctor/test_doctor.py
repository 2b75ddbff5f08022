"""`appliance doctor` on hosts that really lack something, made with namespaces and limits."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from appliance.doctor.findings import Use
from appliance.doctor.trial import attempt

pytestmark = pytest.mark.slow

APPLIANCE: Final = str(Path(sys.executable).with_name("appliance"))
DEADLINE_S: Final = 120
NOBODY: Final = 65534
# With a capability, because the interpreter may be in a directory that only root can search.
AS_NOBODY: Final = (
    "/usr/bin/setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
)


class Report(NamedTuple):
    status: int
    uses: dict[str, bool]
    findings: dict[str, Any]
    error: str


def doctor(
    *words: str,
    store: Path,
    setup: str = "",
    before: Callable[[], None] | None = None,
    path: str | None = None,
    prefix: tuple[str, ...] = (),
) -> Report:
    """Run the command; `setup` is a line of shell before it, in namespaces of its own."""
    command = [*prefix, APPLIANCE, "doctor", "--json", "--store", f"lmdb://{store}", *words]
    if setup:
        command = ["unshare", "--mount", "sh", "-ec", f'{setup}\nexec "$@"', "sh", *command]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        preexec_fn=before,
        env=os.environ | ({"PATH": path} if path is not None else {}),
    )
    assert done.returncode in {0, 1}, done.stderr
    report = json.loads(done.stdout)
    findings = {finding["subject"]: finding for finding in report["findings"]}
    for finding in findings.values():
        # Each that is not good names what mends it, and no other does.
        assert (finding["remedy"] is None) == (finding["verdict"] == "ok")
    return Report(done.returncode, report["uses"], findings, done.stderr)


def test_this_host_can_be_used_for_everything(tmp_path: Path) -> None:
    report = doctor(*(use.value for use in Use), store=tmp_path / "store")
    assert report.uses == {use.value: True for use in Use}, report.findings
    assert report.status == 0
    assert report.findings["a mount"]["verdict"] == "ok"
    assert list(tmp_path.iterdir()) == []
    assert "appliance-doctor" not in Path("/proc/self/mountinfo").read_text()


def test_without_uses_it_examines_what_production_needs(tmp_path: Path) -> None:
    report = doctor(store=tmp_path / "store")
    assert set(report.uses) == {"virtiofs", "mount", "daemon", "import"}
    assert "programs for the tests" not in report.findings


def test_only_the_uses_that_are_affected_fail(tmp_path: Path) -> None:
    report = doctor(
        *("mount", "virtiofs"),
        store=tmp_path / "store",
        setup=f"mkdir {tmp_path}/d; mknod {tmp_path}/d/null c 1 3; mount --bind {tmp_path}/d /dev",
    )
    assert report.status == 1
    assert report.uses == {"mount": False, "virtiofs": True}
    assert report.findings["/dev/fuse"]["found"] == "not there"
    assert report.findings["a mount"]["verdict"] == "lacking"
    assert report.error == "appliance: this host lacks what it needs for: mount\n"


def limited(kind: int, soft: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (soft, soft))


@pytest.mark.parametrize(
    ("kind", "limit", "subject", "verdict"),
    [
        (resource.RLIMIT_NOFILE, 4096, "open descriptors", "advice"),
        (resource.RLIMIT_NOFILE, 128, "open descriptors", "lacking"),
        (resource.RLIMIT_AS, 8 << 30, "address space for LMDB", "advice"),
        (resource.RLIMIT_AS, 1 << 30, "address space for LMDB", "lacking"),
    ],
)
def test_limits(kind: int, limit: int, subject: str, verdict: str, tmp_path: Path) -> None:
    finding = doctor("daemon", store=tmp_path / "store", before=limited(kind, limit))
    assert finding.findings[subject]["verdict"] == verdict, finding.findings[subject]


def test_a_user_without_rights(tmp_path: Path) -> None:
    report = doctor(
        *("virtiofs", "mount"),
        store=tmp_path / "store",
        before=limited(resource.RLIMIT_MEMLOCK, 0),
        prefix=AS_NOBODY,
        path="/nowhere",
    )
    assert report.findings["rights on the store"]["verdict"] == "lacking"
    assert report.findings["fusermount3"]["remedy"] == "apt-get install fuse3"
    assert report.findings["a mount"]["verdict"] == "lacking"
    assert report.findings["locked memory"]["verdict"] == "advice"
    assert report.findings["QEMU"]["verdict"] == "advice"
    assert report.uses == {"virtiofs": False, "mount": False}


def test_shared_memory_of_a_container(tmp_path: Path) -> None:
    report = doctor(
        "virtiofs",
        store=tmp_path / "store",
        setup="mount -t tmpfs -o size=64M tmpfs /dev/shm",
    )
    finding = report.findings["shared memory (/dev/shm)"]
    assert finding["verdict"] == "advice"
    assert finding["found"].startswith("64 MiB free of 64 MiB")


def test_a_store_that_does_not_outlive_the_boot(tmp_path: Path) -> None:
    report = doctor("daemon", store=tmp_path / "store", setup=f"mount -t tmpfs tmpfs {tmp_path}")
    assert report.findings["file system of the store"]["found"].startswith("tmpfs")
    assert report.status == 0


def test_a_file_system_that_cannot_reserve_space(tmp_path: Path) -> None:
    image, place = tmp_path / "image", tmp_path / "place"
    place.mkdir()
    make = f"truncate --size=64M {image}; mkfs.ext2 -q -F {image}; mount -o loop {image} {place}"
    report = doctor("daemon", store=place / "store", setup=make)
    finding = report.findings["LMDB on that file system"]
    assert finding["verdict"] == "advice"
    assert finding["found"].startswith("works; space cannot be reserved")
    assert report.status == 0


def test_namespaces_that_are_switched_off(tmp_path: Path) -> None:
    # A user namespace has limits of its own, which its root sets.
    line = "echo 0 > /proc/sys/user/max_net_namespaces"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    done = subprocess.run(
        [
            *(*command, f'{line}; exec "$@"', "sh"),
            *(APPLIANCE, "doctor", "--json", "virtiofs", "--store", f"lmdb://{tmp_path}/store"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    findings = {each["subject"]: each for each in json.loads(done.stdout)["findings"]}
    assert findings["namespaces"]["verdict"] == "advice", done.stderr


@pytest.fixture
def small_group() -> Iterator[Path]:
    """Return a control group that allows few processes."""
    tops = (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup"))
    group = next(top for top in tops if top.is_dir()) / f"doctor-{os.getpid()}"
    group.mkdir()
    (group / "pids.max").write_text("40")
    yield group
    group.rmdir()


def test_a_control_group_with_few_processes(small_group: Path, tmp_path: Path) -> None:
    def enter() -> None:
        (small_group / "cgroup.procs").write_text(str(os.getpid()))

    report = doctor("virtiofs", store=tmp_path / "store", before=enter)
    finding = report.findings["control group (pids)"]
    assert finding["verdict"] == "advice"
    assert finding["found"] == f"40 processes by {small_group}/pids.max"


def test_rights_on_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        shutil.copy("/etc/passwd", tmp_path / "passwd")
        with (tmp_path / "passwd").open("a") as passwd:
            passwd.write("qemu:x:64999:64999::/:/bin/false\n")
        setup = f"mount --bind {tmp_path}/passwd /etc/passwd"
        words = ("virtiofs", "--socket-path", str(path))
        denied = doctor(*words, store=tmp_path / "store", setup=setup)
        for each in (tmp_path, *tmp_path.parents):
            if not each.stat().st_mode & 0o001:
                each.chmod(0o755)
        path.chmod(0o666)
        allowed = doctor(*words, store=tmp_path / "store", setup=setup)
    subject = f"socket {path}: user qemu"
    assert denied.findings[subject]["verdict"] == "lacking"
    assert allowed.findings[subject]["found"] == "may connect"
    gone = doctor("virtiofs", "--socket-path", "/nowhere", store=tmp_path / "store")
    assert gone.findings["socket /nowhere"]["found"] == "No such file or directory"


def test_the_text_shows_what_to_mend_and_how(tmp_path: Path) -> None:
    command = [APPLIANCE, "doctor", "daemon", "--store", f"lmdb://{tmp_path}/store"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
        preexec_fn=limited(resource.RLIMIT_NOFILE, 128),
    )
    assert done.returncode == 1
    first, second, *_others, last = done.stdout.splitlines()
    assert first == "lacking  open descriptors: up to 128"
    assert second.strip().startswith("to mend it: LimitNOFILE=65536")
    assert last.endswith("checks found nothing to mend")


def test_an_unknown_use_is_refused() -> None:
    done = subprocess.run(
        [APPLIANCE, "doctor", "mounts"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "appliance: USE mounts: must be one of virtiofs, mount, daemon, import, tests\n"
    )


def test_a_trial_says_why_it_failed() -> None:
    def refused() -> str:
        raise PermissionError(1, "not for you")

    def killed() -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    assert attempt(lambda: "text") == (True, "text", 0)
    assert attempt(refused) == (False, "not for you", 0)
    assert attempt(killed).text == "killed by SIGKILL"
