"""Packages of a newer release of Debian, unpacked beside this one and run by their own loader."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from vmharness.cache import HarnessError

_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_TARGETS: Final = "$(CREATED_BY) $(LABEL) $(REPO_URI)"
_APT_DEADLINE_S: Final = 1200


def unpack(suite: str, packages: Sequence[str], target: Path, *, with_all: bool = False) -> None:
    """Unpack packages of a suite, from the mirror of this release, into the new directory `target`.

    Args:
        suite: such as "trixie".
        packages: their names.
        target: has usr/, etc/ and so on afterwards.
        with_all: whether to unpack what they depend on, too.

    Raises:
        HarnessError: the mirror does not have them, or cannot be reached.
    """
    target.mkdir()
    apt = target / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True)
    source = f"deb [signed-by={_KEYRING}] {_mirror()} {suite} main\n"
    (apt / "sources.list").write_text(source)
    (apt / "status").write_text("")  # nothing is installed there
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": os.devnull,
        "Dir::Etc::preferencesparts": os.devnull,
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    _run("apt-get", "-qq", *options, "update", cwd=apt)
    if with_all:
        install = ("--download-only", "--no-install-recommends", "--yes", "install")
        _run("apt-get", "-qq", *options, *install, *packages, cwd=apt)
    else:
        _run("apt-get", "-qq", *options, "download", *packages, cwd=apt)
    for package in apt.rglob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(target), cwd=apt)
    shutil.rmtree(apt)


def command_of(root: Path, program: str) -> list[str]:
    """Return how to start a program that was unpacked, whose C library is newer than ours.

    Args:
        root: the directory that it was unpacked into.
        program: its path below that.
    """
    libraries = root / "usr/lib/x86_64-linux-gnu"
    loader = libraries / "ld-linux-x86-64.so.2"
    return [str(loader), "--library-path", str(libraries), str(root / program)]


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
