"""What runs guests: QEMU, libvirt and KVM; who may connect to sockets; what the tests need."""

import os
import pwd
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from appliance.doctor.findings import Finding, Use, Verdict, advice, good, lacking
from appliance.doctor.trial import attempt

_VIRTIOFS: Final = frozenset({Use.VIRTIOFS})
_GUESTS: Final = frozenset({Use.VIRTIOFS, Use.TESTS})
_TESTS: Final = frozenset({Use.TESTS})
_KVM: Final = Path("/dev/kvm")
_DEADLINE_S: Final = 30
# libvirt 6.2.0 has virtiofs.
_LIBVIRT_MIN: Final = (6, 2)
# The users that run VMMs: of libvirt on Debian, Fedora, and plain packages of QEMU.
_VMM_USERS: Final = ("libvirt-qemu", "qemu")
# Programs that the tests run, and the Debian packages that have them.
_TEST_PROGRAMS: Final = {
    "busybox": "busybox-static",
    "gcc": "gcc",
    "git": "git",
    "linux.uml": "user-mode-linux",
    "nix-store": "nix-bin",
    "openssl": "openssl",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "squashfuse": "squashfuse",
}


def guest_checks(sockets: Iterable[Path]) -> Iterator[Finding]:
    """Yield what is to be known about guests and about rights on `sockets`."""
    yield _qemu()
    yield _libvirt()
    yield _kvm()
    for path in sockets:
        yield from _socket(path)
    yield _test_programs()


# --- VMMs ---


def _qemu() -> Finding:
    """Ask QEMU itself for the device and for shared memory; only the text shows its version."""
    subject = "QEMU"
    program = f"qemu-system-{os.uname().machine}"
    install = "apt-get install qemu-system"
    if shutil.which(program) is None:
        found = f"{program} is not installed; cloud-hypervisor and crosvm serve as well"
        # The tests cannot do without.
        return Finding(subject, _GUESTS, Verdict.ADVICE, found, install)
    version = _first_match(r"version (\d+(?:\.\d+)+)", _output(program, "--version"))
    for words in (
        ("-device", "vhost-user-fs-pci,help"),
        ("-object", "memory-backend-memfd,help"),
    ):
        trial = attempt(partial(_checked, program, "-M", "none", *words))
        if not trial.is_success:
            lack = words[1].partition(",")[0]
            found = f"{version} without {lack}: {trial.text}"
            return lacking(subject, _GUESTS, found, install)
    return good(subject, _GUESTS, f"{version}, with vhost-user-fs-pci and memory-backend-memfd")


def _libvirt() -> Finding:
    subject = "libvirt"
    program = next(filter(shutil.which, ("libvirtd", "virtqemud")), None)
    if program is None:
        return good(subject, _VIRTIOFS, "not installed, and not needed by QEMU itself")
    version = _first_match(r"(\d+(?:\.\d+)+)", _output(program, "--version"))
    numbers = tuple(map(int, version.split(".")))
    if numbers < _LIBVIRT_MIN:
        found = f"{version}, which does not know virtiofs"
        return lacking(subject, _VIRTIOFS, found, "apt-get install -t bookworm-backports libvirt")
    return good(subject, _VIRTIOFS, version)


def _kvm() -> Finding:
    subject = str(_KVM)
    slower = "guests are emulated, and slow"
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        remedy = "modprobe kvm_intel or kvm_amd; switch virtualization on in the firmware"
        return advice(subject, _GUESTS, f"not there; {slower}", remedy)
    except OSError as exc:
        user = pwd.getpwuid(os.geteuid()).pw_name
        return advice(subject, _GUESTS, f"{exc.strerror}; {slower}", f"usermod -aG kvm {user}")
    return good(subject, _GUESTS, "can be opened")


# --- Rights on sockets ---


def _socket(path: Path) -> Iterator[Finding]:
    subject = f"socket {path}"
    try:
        status = path.stat()
    except OSError as exc:
        yield lacking(subject, _VIRTIOFS, exc.strerror or str(exc), "start what listens on it")
        return
    if not stat.S_ISSOCK(status.st_mode):
        yield lacking(subject, _VIRTIOFS, "no socket", f"rm {path}, and start what listens on it")
        return
    users = [name for name in _VMM_USERS if _exists(name)] if os.geteuid() == 0 else []
    for name in users:
        yield _right_of(path, f"{subject}: user {name}", partial(_become, name), name)
    if not users:
        name = pwd.getpwuid(os.geteuid()).pw_name
        yield _right_of(path, f"{subject}: user {name}", lambda: None, name)


def _right_of(path: Path, subject: str, become: Callable[[], None], name: str) -> Finding:
    def work() -> str:
        become()
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(0, "may not connect")
        return "may connect"

    trial = attempt(work)
    if trial.is_success:
        return good(subject, _VIRTIOFS, trial.text)
    group = path.stat().st_gid
    remedy = (
        f"--socket-group with a group of {name}, or `setfacl -m u:{name}:rw {path}` "
        f"(its group is {group}; the directories above need x)"
    )
    return lacking(subject, _VIRTIOFS, trial.text, remedy)


def _exists(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _become(name: str) -> None:
    user = pwd.getpwnam(name)
    os.initgroups(name, user.pw_gid)
    os.setresgid(user.pw_gid, user.pw_gid, user.pw_gid)
    os.setresuid(user.pw_uid, user.pw_uid, user.pw_uid)


# --- What the tests run ---


def _test_programs() -> Finding:
    subject = "programs for the tests"
    programs = {**_TEST_PROGRAMS, f"qemu-system-{os.uname().machine}": "qemu-system-x86"}
    absent = [name for name in programs if shutil.which(name) is None]
    if not absent:
        return good(subject, _TESTS, "all there")
    packages = sorted({programs[name] for name in absent})
    found = f"not installed: {', '.join(absent)}"
    return lacking(subject, _TESTS, found, f"apt-get install {' '.join(packages)}")


def _output(*command: str) -> str:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=_DEADLINE_S,
    )
    return done.stdout


def _checked(*command: str) -> str:
    """Return the output of `command`; its last line is the error if it fails."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=_DEADLINE_S,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise OSError(lines[-1])
    return done.stdout


def _first_match(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else "0"
