"""The other virtiofs back-ends to compare with: the C virtiofsd of QEMU, and the one in Rust."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from vmharness.cache import HarnessError, cached

from tests.fakes.appliance_process import DEADLINE_S, every_event

C_VIRTIOFSD: Final = Path("/usr/lib/qemu/virtiofsd")
RUST_VIRTIOFSD: Final = Path("/usr/libexec/virtiofsd")
# The first release of Debian that has the one in Rust, and what it is linked with.
_SUITE: Final = "trixie"
_PACKAGES: Final = ("virtiofsd", "libc6", "libcap-ng0", "libgcc-s1", "libseccomp2")
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TARGETS: Final = "$(CREATED_BY) $(LABEL) $(REPO_URI)"
_APT_DEADLINE_S: Final = 600


class UnavailableError(Exception):
    """A back-end cannot be had on this machine; the text says why."""


def c_command(socket_path: Path, tree: Path) -> list[str]:
    """Return how to serve `tree` with the C virtiofsd, which answers one guest and ends.

    It may cache for ever, as the appliance does; containers allow chroot.
    """
    if not C_VIRTIOFSD.exists():
        raise UnavailableError(f"{C_VIRTIOFSD} is not there (package qemu-system-common)")
    options = f"source={tree},cache=always,sandbox=chroot,log_level=err"
    return [str(C_VIRTIOFSD), f"--socket-path={socket_path}", "-o", options]


def rust_command(socket_path: Path, tree: Path) -> list[str]:
    """Return how to serve `tree` with the Rust virtiofsd, installed or downloaded once."""
    return [
        *_rust_virtiofsd(),
        f"--socket-path={socket_path}",
        f"--shared-dir={tree}",
        *("--cache=always", "--sandbox=chroot", "--log-level=error"),
    ]


@contextlib.contextmanager
def running(command: Sequence[str], socket_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a back-end, and yield its process once its socket is there."""
    if os.geteuid() != 0:
        raise UnavailableError("it needs root")
    log_path = socket_path.with_suffix(".log")
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in every_event(DEADLINE_S):
            if socket_path.exists():
                break
            if process.poll() is not None:
                reason = log_path.read_text(errors="replace").strip()
                raise UnavailableError(f"it ended with status {process.returncode}: {reason}")
        yield process
    finally:
        process.kill()
        process.wait()


def _rust_virtiofsd() -> list[str]:
    if RUST_VIRTIOFSD.exists():
        return [str(RUST_VIRTIOFSD)]
    try:
        root = cached(f"virtiofsd-{_SUITE}", _download)
    except (HarnessError, OSError, subprocess.SubprocessError) as exc:
        raise UnavailableError(f"virtiofsd of Debian {_SUITE} cannot be had: {exc}") from exc
    # Its C library is newer than that of this machine, so it is started by its own loader.
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(libraries), str(root / "usr/libexec/virtiofsd")]


def _download(target: Path) -> None:
    """Unpack the packages of a newer release, from the mirror of this one, into `target`."""
    target.mkdir()
    apt = target / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    source = f"deb [signed-by={_KEYRING}] {_mirror()} {_SUITE} main\n"
    (apt / "sources.list").write_text(source)
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": os.devnull,
        "Dir::State::lists": apt / "lists",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _run("apt-get", "-qq", *options, "update", cwd=apt)
    _run("apt-get", "-qq", *options, "download", *_PACKAGES, cwd=apt)
    for package in apt.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(target), cwd=apt)
    shutil.rmtree(apt)


def _mirror() -> str:
    for line in _run("apt-get", "indextargets", "--format", _TARGETS).splitlines():
        created_by, label, uri = line.split()[:3]
        if (created_by, label) == ("Packages", "Debian"):
            return uri
    raise HarnessError("no mirror of Debian is configured, or its lists are not there")


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, check=False, capture_output=True, text=True, timeout=_APT_DEADLINE_S
    )
    if done.returncode:
        raise HarnessError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
