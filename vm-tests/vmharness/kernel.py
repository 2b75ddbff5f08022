"""Guest kernels: a Debian cloud kernel for QEMU, unpacked without root, and Debian's UML."""

import gzip
import lzma
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vmharness.cache import CACHE, PROJECT, HarnessError, cached, key_of

_METAPACKAGE: Final = "linux-image-{series}cloud-amd64"
_UML: Final = "linux.uml"
_UML_MODULES: Final = Path("/usr/lib/uml/modules")
_WANTED_CONFIG: Final = PROJECT / "vm-tests" / "vmharness" / "kernel.config"
# In the order they must be loaded.
_FS_MODULES: Final = ("fs/fuse/fuse", "fs/fuse/virtiofs", "fs/overlayfs/overlay")
_QEMU_MODULES: Final = (
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci",
    "drivers/char/virtio_console",
    "drivers/block/virtio_blk",
    "drivers/acpi/button",
    "drivers/input/evdev",
    "lib/libcrc32c",
    "fs/erofs/erofs",
    *_FS_MODULES,
)


@dataclass(frozen=True, slots=True)
class Kernel:
    """A bootable image and the modules a guest loads, in loading order."""

    image: Path
    release: str
    modules: tuple[Path, ...]

    @property
    def version(self) -> tuple[int, int]:
        """Major and minor number: which features of the driver to expect."""
        major, minor = self.release.split(".")[:2]
        return int(major), int(minor)


def qemu_kernel(series: str = "") -> Kernel:
    """Return the newest cloud kernel the configured package sources offer; downloads it once.

    Args:
        series: such as "6.12"; by default the release's own.
    """
    prefix = f"kernel{series}-{key_of(name.encode() for name in _QEMU_MODULES)}-"
    present = sorted(CACHE.glob(f"{prefix}*"), key=lambda path: _version_key(path.name))
    if present:
        directory = present[-1]
    else:
        package = _newest_image_package(series)
        name = prefix + package.removeprefix("linux-image-")
        directory = cached(name, lambda path: _download(package, path))
    (image,) = directory.glob("boot/vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    return Kernel(image, release, _modules(directory / "modules", _QEMU_MODULES))


def uml_kernel() -> Kernel:
    """Return Debian's user-mode Linux."""
    image = shutil.which(_UML)
    if image is None:
        raise HarnessError(f"{_UML} is not installed (package user-mode-linux)")
    releases = sorted(_UML_MODULES.glob("*/kernel"), key=lambda path: _version_key(str(path)))
    if not releases:
        raise HarnessError(f"no kernel modules in {_UML_MODULES}")
    return Kernel(Path(image), releases[-1].parent.name, _modules(releases[-1], _FS_MODULES))


def missing_options(built_config: str) -> list[str]:
    """Return the lines of kernel.config that a built .config does not meet."""
    built = set(built_config.splitlines())
    wanted = [line for line in _WANTED_CONFIG.read_text().splitlines() if line[:1] != "#"]
    return [
        line
        for line in wanted
        if line not in built and not (line.endswith("=m") and line[:-1] + "y" in built)
    ]


def uml_config(kernel: Kernel) -> str:
    """Return the .config a UML binary was built with."""
    return _output([str(kernel.image), "--showconfig"])


def module_bytes(module: Path) -> bytes:
    """Return a module's ELF image; newer Debian kernels ship them compressed."""
    data = module.read_bytes()
    match module.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".gz":
            return gzip.decompress(data)
    return data


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError as exc:
        raise HarnessError(f"{command[0]} is not installed") from exc
    except subprocess.CalledProcessError as exc:
        raise HarnessError(f"{' '.join(command)}: {exc.stderr.strip()}") from exc
    return done.stdout


def _version_key(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _newest_image_package(series: str) -> str:
    metapackage = _METAPACKAGE.format(series=f"{series}-" if series else "")
    # madison lists the newest version first
    listed = _output(["apt-cache", "madison", metapackage]).splitlines()
    if not listed:
        raise HarnessError(f"no {metapackage} in the package lists; run apt-get update as root")
    version = listed[0].split("|")[1].strip()
    shown = _output(["apt-cache", "show", f"{metapackage}={version}"])
    depends = re.search(r"^Depends: (linux-image-\S+)", shown, re.MULTILINE)
    if depends is None:
        raise HarnessError(f"{metapackage} {version} depends on no kernel image")
    return depends[1]


def _download(package: str, directory: Path) -> None:
    unpacked = directory / "unpacked"
    unpacked.mkdir(parents=True)
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package]
    done = subprocess.run(command, cwd=directory, check=False, timeout=900)
    if done.returncode:
        raise HarnessError(f"{package} cannot be downloaded: {' '.join(command)} failed")
    (archive,) = directory.glob("*.deb")
    _output(["dpkg-deb", "-x", str(archive), str(unpacked)])
    archive.unlink()
    (config,) = unpacked.glob("boot/config-*")
    if missing := missing_options(config.read_text()):
        raise HarnessError(f"{package} was built without {', '.join(missing)}")
    (unpacked / "boot").rename(directory / "boot")
    (modules,) = unpacked.glob("**/lib/modules/*/kernel")
    for module in _modules(modules, _QEMU_MODULES):
        kept = directory / "modules" / module.relative_to(modules)
        kept.parent.mkdir(parents=True, exist_ok=True)
        module.rename(kept)
    shutil.rmtree(unpacked)


def _modules(directory: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    # what newer kernels have built in or merged is simply not there as a file
    found = [next(directory.glob(f"{name}.ko*"), None) for name in names]
    return tuple(path for path in found if path is not None)
