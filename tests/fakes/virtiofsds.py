"""The other virtiofs back-ends to compare with: the C virtiofsd of QEMU, and the one in Rust."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from vmharness.cache import HarnessError, cached
from vmharness.debian_packages import command_of, unpack

from tests.fakes.running_command import DEADLINE_S, every_event

C_VIRTIOFSD: Final = Path("/usr/lib/qemu/virtiofsd")
RUST_VIRTIOFSD: Final = Path("/usr/libexec/virtiofsd")
# The first release of Debian that has the one in Rust, and what it is linked with.
_SUITE: Final = "trixie"
_PACKAGES: Final = ("virtiofsd", "libc6", "libcap-ng0", "libgcc-s1", "libseccomp2")


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
    return command_of(root, "usr/libexec/virtiofsd")


def _download(target: Path) -> None:
    unpack(_SUITE, _PACKAGES, target)
