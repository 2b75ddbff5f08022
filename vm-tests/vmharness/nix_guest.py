"""Debian's Nix for guests: as a store path of its own, over an overlay above the mount.

The program itself, with the libraries it needs, is a store path that the guest runs from the mount.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Final

from vmharness.guest import Guest

ANSWER_S: Final = 300.0
EQUAL: Final = "setting = 1\n" * 10
# Where guests have the root directory in which Nix runs.
ROOT: Final = "/tmp/root"


def make_tools(path: Path) -> Path:
    """Make a root directory with nix-store, and nothing else but what it loads."""
    listed = subprocess.run(
        ["ldd", "/usr/bin/nix-store"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    for library in re.findall(r"(/\S+) \(0x", listed):
        target = path / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (path / "bin").mkdir()
    shutil.copy("/usr/bin/nix", path / "bin" / "nix-store")
    (path / "etc" / "nix").mkdir(parents=True)
    (path / "etc" / "nix" / "nix.conf").write_text("build-users-group =\nsandbox = false\n")
    (path / "etc" / "passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (path / "etc" / "group").write_text("root:x:0:\n")
    for place in ("nix/store", "dev", "proc", "tmp", "root"):
        (path / place).mkdir(parents=True)
    return path


def make_package(path: Path) -> Path:
    for place in (".", "etc", "share/doc"):
        (path / place).mkdir(parents=True, exist_ok=True)
        for name in ("a.conf", "b.conf"):
            (path / place / name).write_text(EQUAL)
        (path / place / "empty").touch()
    (path / "name").write_text(path.name)
    return path


def overlay(lower: str, upper: str, merged: str) -> str:
    return (
        f"mkdir -p {upper}/up {upper}/work && mount -t overlay overlay"
        f" -o lowerdir={lower},upperdir={upper}/up,workdir={upper}/work {merged}"
    )


def nix(guest: Guest, words: str, *, status: int = 0) -> str:
    """Run nix-store in the root that the test has made; return what it wrote, but for errors.

    Where another `status` than 0 is expected, the errors are returned instead.
    """
    script = f"HOME=/root chroot {ROOT} /bin/nix-store 2>/tmp/errors {words}"
    done = guest.run(script, ANSWER_S)
    errors = guest.check("cat /tmp/errors", ANSWER_S).decode()
    assert done.status == status, (done.output, errors)
    assert status or "error" not in errors, errors
    return errors if status else done.output.decode()
