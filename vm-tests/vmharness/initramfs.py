"""Initial RAM disks, written entry by entry: no root, no mknod, no cpio program.

Format: linux Documentation/driver-api/early-userspace/buffer-format.rst, "newc". It is left
uncompressed: the loader copies it faster than an emulated CPU inflates it.
"""

import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from vmharness.cache import GUEST_SOURCES, HarnessError, cached, key_of
from vmharness.kernel import Kernel, module_bytes

_DIRECTORIES: Final = ("bin", "dev", "mnt", "modules", "proc", "root", "sys", "tmp")
# name -> sources and libraries
_PROGRAMS: Final = {
    "acts": ("acts.c",),
    "agent": ("agent.c",),
    "conformance": ("conformance.c", "conformance_tree.c"),
    "handles": ("handles.c",),
    "overlay": ("overlay.c", "overlay_state.c", "overlay_scenarios.c", "overlay_inodes.c"),
    "probe": ("probe.c", "tree.c", "-lcrypto", "-lpthread"),
}
_CFLAGS: Final = (
    "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow",
)  # fmt: skip
_DEV_CONSOLE: Final = (5, 1)


class _Entry(NamedTuple):
    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def build(kernel: Kernel) -> Path:
    """Return an initramfs for `kernel`: busybox, its modules, the guest programs, init."""
    entries = list(_entries(kernel))
    parts = [b"%s %o %d %d " % (e.name.encode(), e.mode, *e.device) + e.data for e in entries]
    name = f"initramfs-{kernel.release}-{key_of(parts)}"
    return cached(name, lambda path: _write(path, entries))


def program(name: str) -> Path:
    """Return a guest program, by its name in `_PROGRAMS`, compiled and statically linked."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise HarnessError("gcc is not installed")
    command = [compiler, *_CFLAGS, *_PROGRAMS[name]]
    sources = [path.read_bytes() for path in sorted(GUEST_SOURCES.glob("*.[ch]"))]
    key = key_of([*sources, *(word.encode() for word in command)])

    def compile_to(path: Path) -> None:
        done = subprocess.run(
            [*command, "-o", str(path)],
            cwd=GUEST_SOURCES, check=False, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise HarnessError(f"guest program {name} does not compile:\n{done.stderr}")

    return cached(f"{name}-{key}", compile_to)


def _entries(kernel: Kernel) -> Iterator[_Entry]:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise HarnessError("busybox is not installed (package busybox-static)")
    for name in _DIRECTORIES:
        yield _Entry(name, stat.S_IFDIR | 0o755)
    yield _Entry("dev/console", stat.S_IFCHR | 0o600, device=_DEV_CONSOLE)
    yield _Entry("init", stat.S_IFREG | 0o755, (GUEST_SOURCES / "init").read_bytes())
    yield _Entry("bin/busybox", stat.S_IFREG | 0o755, Path(busybox).read_bytes())
    for name in _PROGRAMS:
        yield _Entry(f"bin/{name}", stat.S_IFREG | 0o755, program(name).read_bytes())
    for number, module in enumerate(kernel.modules):
        name = module.name.partition(".")[0]
        yield _Entry(f"modules/{number:02}-{name}.ko", stat.S_IFREG | 0o644, module_bytes(module))


def _write(path: Path, entries: list[_Entry]) -> None:
    with path.open("wb") as file:
        for ino, entry in enumerate([*entries, _Entry("TRAILER!!!", 0)], start=1):
            name = entry.name.encode() + b"\0"
            fields = (ino, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, *entry.device, len(name))
            header = b"070701" + b"".join(b"%08x" % field for field in (*fields, 0)) + name
            file.write(header + bytes(-len(header) % 4))
            file.write(entry.data + bytes(-len(entry.data) % 4))
