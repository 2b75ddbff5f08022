"""Writes the cffi wrapper of each C module, `_NAME.c`: here, or to the directory argv[1]."""

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
HEADERS = {
    "bench": ("bench.h",),
    "engine": ("engine.h", "answers.h", "dirty_log.h", "refused.h"),
    "fastcdc": ("fastcdc.h",),
    "images": ("images.h", "frames.h"),
    "reader": ("reader.h",),
}


def cdef_text(name: str) -> str:
    """Return the headers of a module without their preprocessor lines."""
    text = "".join((HERE / header).read_text(encoding="utf-8") for header in HEADERS[name])
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def emit(directory: Path = HERE) -> None:
    """Write the wrappers to `directory`; a file that is right already keeps its time stamp."""
    for name, headers in HEADERS.items():
        ffi = cffi.FFI()
        ffi.cdef(cdef_text(name))
        source = "".join(f'#include "{header}"\n' for header in headers)
        ffi.set_source(f"appliance._{name}", source)
        ffi.emit_c_code(str(directory / f"_{name}.c"))


if __name__ == "__main__":
    emit(*map(Path, sys.argv[1:]))
