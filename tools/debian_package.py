"""Builds a Debian package of this checkout: `python -m tools.debian_package DIRECTORY`.

Debian 12 lacks some of the Python packages that the program needs, and has others in versions that
are too old. The package therefore brings all of them, in /usr/lib/appliance: the versions that are
installed in this environment, with which the tests have run, copied file by file. Nothing is
downloaded. The interpreter is Debian's, so this environment must have one of the same minor
version.

    /usr/bin/appliance, appliance-virtiofsd          scripts that load /usr/lib/appliance
    /usr/sbin/mount.appliance, mount.fuse.appliance  the same, for mount(8)
    /usr/lib/appliance                               the program and the packages it needs
    /lib/systemd/system, /usr/lib/sysusers.d, ...    units, and what they need
    /etc/appliance/appliance.toml                    the configuration, with nothing set
    /usr/share                                       manual pages, completions, the description of
                                                     the vhost-user back-end, documents

Source: Debian Policy 4.6.2; deb(5), deb-control(5).
"""

import gzip
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from email.utils import formatdate
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

from appliance import __version__
from appliance.config.settings import DEFAULT_CONFIG
from tools import completions, config_pages, man_pages
from tools.manylinux_wheel import build_wheel
from tools.other_programs import run

TREE: Final = Path(__file__).resolve().parents[1]
PROGRAM: Final = "appliance"
LIBRARY: Final = "usr/lib/appliance"
CONFIGURATION: Final = str(DEFAULT_CONFIG.relative_to("/"))
_RECIPES: Final = TREE / "setup" / "debian"
_SCRIPTS: Final = {
    "usr/bin/appliance": "main",
    "usr/bin/appliance-virtiofsd": "virtiofsd",
    "usr/sbin/mount.appliance": "mount_helper",
    "usr/sbin/mount.fuse.appliance": "mount_helper",
}
# Isolated: neither PYTHONPATH nor packages of the user get in.
_SCRIPT: Final = f"""\
#!/usr/bin/python3 -I
import sys

sys.path.insert(0, "/{LIBRARY}")

from appliance.__main__ import {{function}}

{{function}}()
"""
_MAINTAINER: Final = os.environ.get("DEBFULLNAME", "Appliance maintainers")
_MAIL: Final = os.environ.get("DEBEMAIL", "maintainers@appliance.example")
_CONTROL: Final = """\
Package: appliance
Version: {version}
Architecture: {architecture}
Maintainer: {maintainer}
Installed-Size: {size}
Depends: python3 (>= {python}), python3 (<< {next_python}), liblmdb0, libc6
Recommends: fuse3
Suggests: qemu-system-x86
Section: admin
Priority: optional
Description: read-only virtiofs server over a content-addressed store
 Appliance keeps file trees in a content-addressed store and serves them as a
 read-only file system: to virtual machines over virtiofs, to the host itself
 through FUSE, and to others over gRPC and as a binary cache for Nix.
"""
# What the packages bring that is of no use to the program.
_LEFT_OUT: Final = ("*.pyi", "*.pxd", "*.pyx", "*.c", "*.h", "__pycache__", "tests")
_COPYRIGHT: Final = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: appliance

Files: *
Copyright: {year} The authors of Appliance
License: Apache-2.0
 On Debian systems, the text of the license is in
 /usr/share/common-licenses/Apache-2.0.
Comment:
 The Python packages in /usr/lib/appliance have licenses of their own, which are
 in the *.dist-info directories beside them.
"""


def build(directory: Path, *, is_compressed: bool = True) -> Path:
    """Build the package in `directory` and return its path.

    Args:
        directory: receives the package; it is created if it does not exist.
        is_compressed: whether to compress it, which takes most of the time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="appliance-deb-") as temporary:
        root = Path(temporary, "root")
        _install_library(root / LIBRARY, Path(temporary))
        _install_scripts(root)
        _install_units(root)
        _write(root / CONFIGURATION, config_pages.example())
        _install_share(root)
        _install_control(root)
        _set_modes(root)
        package = directory / f"{PROGRAM}_{__version__}_{_architecture()}.deb"
        form = "-Zxz" if is_compressed else "-Znone"
        run("dpkg-deb", form, "--root-owner-group", "--build", str(root), str(package))
    return package


# --- The program and what it needs ---


def _install_library(library: Path, temporary: Path) -> None:
    library.mkdir(parents=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    wheel = build_wheel(temporary)
    target = ("--no-deps", "--no-compile", "--no-index", "--target", str(library))
    run(*pip, "install", *target, str(wheel))
    for name in ("bin", "share"):
        shutil.rmtree(library / name, ignore_errors=True)
    for needed in _closure():
        _copy_distribution(needed, library)
    for pattern in _LEFT_OUT:
        for path in library.rglob(pattern):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _closure() -> Iterator[Distribution]:
    """Yield the distributions that the program needs here, without itself."""
    seen = {PROGRAM}
    waiting = [distribution(PROGRAM)]
    while waiting:
        for text in waiting.pop().requires or ():
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            name = requirement.name.lower().replace("_", "-")
            if name not in seen:
                seen.add(name)
                needed = distribution(name)
                waiting.append(needed)
                yield needed


def _copy_distribution(needed: Distribution, library: Path) -> None:
    for file in needed.files or ():
        # Scripts are outside of site-packages, and of no use here.
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        target = library / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(str(needed.locate_file(file))), target)


def _install_scripts(root: Path) -> None:
    for place, function in _SCRIPTS.items():
        _write(root / place, _SCRIPT.format(function=function), mode=0o755)


# --- Everything else ---


def _install_units(root: Path) -> None:
    units = root / "lib" / "systemd" / "system"
    units.mkdir(parents=True)
    for unit in sorted((TREE / "systemd").iterdir()):
        shutil.copyfile(unit, units / unit.name)
    group = (_RECIPES / "socket-group.conf").read_text()
    _write(units / "appliance-daemon.socket.d" / "group.conf", group)
    for kind in ("sysusers", "tmpfiles"):
        text = (_RECIPES / f"{kind}.conf").read_text()
        _write(root / "usr" / "lib" / f"{kind}.d" / f"{PROGRAM}.conf", text)


def _install_share(root: Path) -> None:
    share = root / "usr" / "share"
    pages = man_pages.pages()
    # mount(8) looks for these under the types of the file system, and people do as well.
    for name in ("mount.appliance.8", "mount.fuse.appliance.8"):
        pages[name] = ".so man1/appliance-mount.1\n"
    for name, page in pages.items():
        section = name[-1]
        _write_compressed(share / "man" / f"man{section}" / f"{name}.gz", page)
    for shell, place in completions.PLACES.items():
        _write(root / "usr" / place, completions.completion(shell))
    for description in sorted((TREE / "share" / "vhost-user").glob("*.json")):
        _write(share / "qemu" / "vhost-user" / description.name, description.read_text())
    documents = share / "doc" / PROGRAM
    for document in (
        *("README.md", "SECURITY.md"),
        *("docs/architecture.md", "docs/compatibility.md", "docs/configuration.md"),
    ):
        _write(documents / Path(document).name, (TREE / document).read_text())
    for path in sorted((TREE / "docs" / "monitoring").iterdir()):
        _write(documents / "monitoring" / path.name, path.read_text())
    year = time.gmtime(_seconds()).tm_year
    _write(documents / "copyright", _COPYRIGHT.format(year=year))
    date = formatdate(_seconds())
    entry = (
        f"{PROGRAM} ({__version__}) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n"
        f" -- {_MAINTAINER} <{_MAIL}>  {date}\n"
    )
    _write_compressed(documents / "changelog.gz", entry)
    overrides = (_RECIPES / "lintian-overrides").read_text()
    _write(share / "lintian" / "overrides" / PROGRAM, overrides)


def _install_control(root: Path) -> None:
    control = root / "DEBIAN"
    # dpkg keeps the sums of configuration files elsewhere.
    _write(control / "conffiles", f"/{CONFIGURATION}\n")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    sums = (
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  "
        f"{path.relative_to(root)}\n"
        for path in files
        if path.is_relative_to(root / "usr") or path.is_relative_to(root / "lib")
    )
    _write(control / "md5sums", "".join(sums))
    major, minor = sys.version_info[:2]
    text = _CONTROL.format(
        version=__version__,
        architecture=_architecture(),
        maintainer=f"{_MAINTAINER} <{_MAIL}>",
        size=sum(path.stat().st_size for path in files) // 1024,
        python=f"{major}.{minor}",
        next_python=f"{major}.{minor + 1}",
    )
    _write(control / "control", text)
    for script in ("postinst", "prerm", "postrm"):
        _write(control / script, (_RECIPES / script).read_text(), mode=0o755)


def _set_modes(root: Path) -> None:
    """Give every file the mode that it would have been made with under the usual umask."""
    root.chmod(0o755)
    for path in root.rglob("*"):
        is_executable = path.is_dir() or (path.stat().st_mode & 0o111 and path.suffix != ".so")
        path.chmod(0o755 if is_executable else 0o644)


def _seconds() -> int:
    """Return the time that the package states, which reproducible builds set."""
    return int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))


def _architecture() -> str:
    return run("dpkg", "--print-architecture").strip()


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)


def _write_compressed(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def main(words: list[str]) -> None:
    """Build the package in the directory that is named, and print its path."""
    if len(words) != 1:
        sys.exit("usage: python -m tools.debian_package DIRECTORY")
    print(build(Path(words[0])))  # noqa: T201 - what the caller asked for


if __name__ == "__main__":
    main(sys.argv[1:])
