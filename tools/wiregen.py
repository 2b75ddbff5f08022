"""Generates the wire codecs and `tests/c/wire_abi.c` from the wire tables.

`fuse_table.py` and `vhost_table.py` declare each structure and number of a protocol once, as rows
of the types below; this program writes the Python codecs and, for tables with a C header,
compile-time assertions that hold the table to that header.

`python -m tools.wiregen`, run from the top of the checkout, writes; with `--check` it writes
nothing, prints a diff and exits 1 if anything is stale.

A table module has `STRUCTS` (a sequence of `Struct`, nested ones before their users), `ENUMS` (a
sequence of `Enum` and `Flags`), `OUTPUT` (the path of the codec in the checkout) and `C_HEADER`
(such as "linux/fuse.h", or None when there is no header to check against).

For `Struct("ReadIn", ...)` the generated module holds `class ReadIn(NamedTuple)`, `READ_IN` (its
`struct.Struct`), `READ_IN_SIZE` (bytes), `unpack_read_in(buf, offset=0)` and `pack_read_in(value)`.
Unpacking a short buffer and packing a number out of range raise `struct.error`. `CODECS` maps each
class name to its size, unpacker and packer.
"""

import argparse
import difflib
import importlib
import re
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

TREE: Final = Path(__file__).resolve().parents[1]
TABLES: Final = ("tools.fuse_table", "tools.vhost_table")
ABI_FILE: Final = Path("tests/c/wire_abi.c")
C_MINOR: Final = "FUSE_KERNEL_MINOR_VERSION"
_LINE_MAX: Final = 100

# --- Row types ---


@dataclass(frozen=True)
class Struct:
    """One structure of a wire format.

    Args:
        name: the Python class, such as "ReadIn".
        c_name: the C structure, such as "fuse_read_in"; only documentation without a header.
        fields: space-separated `name:code`. A code is one of `B H I Q b h i q` (integers of 1, 2, 4
            and 8 bytes), `36s` (bytes of exactly that length) or the name of a structure earlier in
            the table. A bare `4x` is padding: no field, packed as zeros. A trailing underscore
            keeps a name clear of Python's (`count_`); C does not have it.
        min_minor: first protocol minor whose header knows the structure; with an older header its
            assertions are skipped.
        newer: field name -> first minor whose header has that field under that name.
    """

    name: str
    c_name: str
    fields: str
    min_minor: int = 0
    newer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Enum:
    """Numbers of which a wire field holds one; becomes an `IntEnum`.

    Args:
        name: the Python class.
        members: member name -> value.
        c_prefix: what C puts before each member's name; empty when C does not name them.
        newer: member name -> first protocol minor whose header has it.
    """

    name: str
    members: Mapping[str, int]
    c_prefix: str = ""
    newer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Flags(Enum):
    """Bits of which a wire field holds any number; becomes an `IntFlag`."""


@dataclass(frozen=True)
class Table:
    """One loaded wire table and where its codec goes."""

    module: str
    path: Path
    structs: Sequence[Struct]
    enums: Sequence[Enum]
    c_header: str | None


# --- Layout ---


class Field(NamedTuple):
    """One parsed field: where it is, and how it is read."""

    name: str
    offset: int
    size: int
    code: str
    type_name: str
    nested: "Layout | None"


class Layout(NamedTuple):
    """A parsed structure; `codes` are struct codes of all leaves in order, padding included."""

    row: Struct
    fields: tuple[Field, ...]
    codes: tuple[str, ...]
    size: int
    leaves: int


_PADDING: Final = re.compile(r"[1-9][0-9]*x")
_LEAF: Final = re.compile(r"[BHIQbhiq]|[1-9][0-9]*s")


def parse_layouts(rows: Sequence[Struct]) -> dict[str, Layout]:
    """Return the layout of each structure by Python name.

    Raises:
        ValueError: a row names an unknown code or structure, or a name twice.
    """
    layouts: dict[str, Layout] = {}
    for row in rows:
        if row.name in layouts:
            raise ValueError(f"structure {row.name} is declared twice")
        layouts[row.name] = _parse(row, layouts)
    return layouts


def _parse(row: Struct, known: Mapping[str, Layout]) -> Layout:
    fields: list[Field] = []
    codes: list[str] = []
    for item in row.fields.split():
        offset = struct.calcsize("<" + "".join(codes))
        if _PADDING.fullmatch(item):
            codes.append(item)
            continue
        name, _, code = item.partition(":")
        nested = known.get(code)
        if nested is not None:
            fields.append(Field(name, offset, nested.size, code, code, nested))
            codes.extend(nested.codes)
        elif _LEAF.fullmatch(code):
            type_name = "bytes" if code.endswith("s") else "int"
            fields.append(Field(name, offset, struct.calcsize("<" + code), code, type_name, None))
            codes.append(code)
        else:
            raise ValueError(f"structure {row.name}: no such code in {item!r}")
    if len({item.name for item in fields}) != len(fields):
        raise ValueError(f"structure {row.name} names a field twice")
    leaves = sum(item.nested.leaves if item.nested else 1 for item in fields)
    return Layout(row, tuple(fields), tuple(codes), struct.calcsize("<" + "".join(codes)), leaves)


def _struct_format(codes: Sequence[str]) -> str:
    # "QQQII" reads better, and is shorter, as "3Q2I"; codes that carry a count stay as they are.
    parts: list[tuple[str, int]] = []
    for code in codes:
        if parts and len(code) == 1 and parts[-1][0] == code:
            parts[-1] = (code, parts[-1][1] + 1)
        else:
            parts.append((code, 1))
    return "<" + "".join(f"{num}{code}" if num > 1 else code for code, num in parts)


def snake_case(name: str) -> str:
    """Return "entry_out" for "EntryOut"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


# --- Python output ---


def render_python(table: Table) -> str:
    """Return the source of the codec module of `table`, as `ruff format` would leave it."""
    lines = [
        f'"""Wire codec, generated from {table.module} by tools.wiregen; do not edit."""',
        "",
        "import sys",
        "from collections.abc import Callable",
        *(["from enum import IntEnum, IntFlag"] if table.enums else []),
        "from struct import Struct",
        "from typing import Any, NamedTuple",
        "",
        "Buffer = bytes | bytearray | memoryview",
        "",
        'if sys.byteorder != "little":',
        '    raise ImportError("the wire is in host order: only little-endian hosts will do")',
    ]
    for enum in table.enums:
        lines += ["", "", *_python_enum(enum)]
    layouts = parse_layouts(table.structs).values()
    for layout in layouts:
        lines += ["", "", *_python_struct(layout)]
    lines += ["", "", *_python_codecs(layouts)]
    text = "\n".join(lines) + "\n"
    missing = {"IntEnum", "IntFlag"} - {_enum_base(enum) for enum in table.enums}
    if len(missing) == 1:
        present = ({"IntEnum", "IntFlag"} - missing).pop()
        text = text.replace("import IntEnum, IntFlag", f"import {present}")
    return text


def _enum_base(enum: Enum) -> str:
    return "IntFlag" if isinstance(enum, Flags) else "IntEnum"


def _python_enum(enum: Enum) -> Iterator[str]:
    yield f"class {enum.name}({_enum_base(enum)}):"
    for name, value in enum.members.items():
        shown = f"0x{value:X}" if isinstance(enum, Flags) else str(value)
        yield f"    {name} = {shown}"


def _python_struct(layout: Layout) -> Iterator[str]:
    name = layout.row.name
    snake = snake_case(name)
    constant = snake.upper()
    yield f"class {name}(NamedTuple):"
    for item in layout.fields:
        yield f"    {item.name}: {item.type_name}"
    yield ""
    yield ""
    yield f'{constant} = Struct("{_struct_format(layout.codes)}")'
    yield f"{constant}_SIZE = {layout.size}"
    yield ""
    yield ""
    yield f"def unpack_{snake}(buf: Buffer, offset: int = 0) -> {name}:"
    if _is_flat(layout):
        # Cheaper than NamedTuple's own __new__ and _make, by a third of each decode.
        yield f"    return tuple.__new__({name}, {constant}.unpack_from(buf, offset))"
    else:
        yield f"    flat = {constant}.unpack_from(buf, offset)"
        first, *rest = _make_lines(layout, 0, "    ")
        yield f"    return {first.lstrip()}"
        yield from rest
    yield ""
    yield ""
    yield f"def pack_{snake}(value: {name}) -> bytes:"
    parts = _flat_parts(layout, "value")
    if len(parts) == 1:
        yield f"    return {constant}.pack({parts[0]})"
    else:
        yield f"    return {constant}.pack("
        yield from (f"        {part}," for part in parts)
        yield "    )"


def _python_codecs(layouts: Iterable[Layout]) -> Iterator[str]:
    yield "class _Codec(NamedTuple):"
    yield "    size: int"
    yield "    unpack: Callable[[Buffer, int], tuple[Any, ...]]"
    yield "    pack: Callable[[Any], bytes]"
    yield ""
    yield ""
    yield "CODECS = {"
    for layout in layouts:
        name = layout.row.name
        snake = snake_case(name)
        arguments = (f"{snake.upper()}_SIZE", f"unpack_{snake}", f"pack_{snake}")
        line = f'    "{name}": _Codec({", ".join(arguments)}),'
        if len(line) <= _LINE_MAX:
            yield line
        else:
            yield f'    "{name}": _Codec('
            yield from (f"        {argument}," for argument in arguments)
            yield "    ),"
    yield "}"


def _is_flat(layout: Layout) -> bool:
    return not any(item.nested for item in layout.fields)


# The expression that builds one structure from `flat`, the leaves of the outermost one.
def _make_lines(layout: Layout, start: int, indent: str) -> list[str]:
    if _is_flat(layout):
        return [f"{indent}tuple.__new__({layout.row.name}, flat[{start}:{start + layout.leaves}])"]
    inner = indent + " " * 8
    parts: list[str] = []
    for nested, at, leaves in _leaf_runs(layout, start):
        lines = [f"{inner}*flat[{at}:{at + leaves}]"]
        if nested is not None:
            lines = _make_lines(nested, at, inner)
        parts += [*lines[:-1], lines[-1] + ","]
    if len(parts) == 1:
        return [f"{indent}{layout.row.name}._make(({parts[0].lstrip()}))"]
    return [
        f"{indent}{layout.row.name}._make(",
        f"{indent}    (",
        *parts,
        f"{indent}    )",
        f"{indent})",
    ]


# (nested structure or None, first leaf, number of leaves), plain neighbours taken together.
def _leaf_runs(layout: Layout, start: int) -> Iterator[tuple[Layout | None, int, int]]:
    run = at = start
    for item in layout.fields:
        if item.nested is None:
            at += 1
            continue
        if at > run:
            yield None, run, at - run
        yield item.nested, at, item.nested.leaves
        run = at = at + item.nested.leaves
    if at > run:
        yield None, run, at - run


def _flat_parts(layout: Layout, value: str) -> list[str]:
    if _is_flat(layout):
        return [f"*{value}"]
    parts: list[str] = []
    run = 0
    for number, item in enumerate(layout.fields):
        if item.nested is None:
            continue
        if number > run:
            parts.append(f"*{value}[{run}:{number}]")
        parts += _flat_parts(item.nested, f"{value}.{item.name}")
        run = number + 1
    if run < len(layout.fields):
        parts.append(f"*{value}[{run}:]")
    return parts


# --- C output ---


def render_c(tables: Sequence[Table]) -> str:
    """Return the C file that fails to compile where a table and its header disagree."""
    lines = [
        "/* Generated from the wire tables by `python -m tools.wiregen`; do not edit. */",
        "#include <stddef.h>",
        *(f"#include <{table.c_header}>" for table in tables if table.c_header),
        "",
        "#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)",
        "#define FIELD(type, field, offset, size)                                 \\",
        "\t_Static_assert(offsetof(type, field) == (offset) &&              \\",
        '\t\t       sizeof(((type *)0)->field) == (size), #type "." #field)',
        "#define VALUE(name, value) _Static_assert((name) == (value), #name)",
    ]
    for table in tables:
        if table.c_header is None:
            continue
        for enum in table.enums:
            lines += _c_enum(enum)
        for layout in parse_layouts(table.structs).values():
            lines += _c_struct(layout)
    return "\n".join(lines) + "\n"


def _guarded(minor: int, lines: Sequence[str]) -> Sequence[str]:
    return [f"#if {C_MINOR} >= {minor}", *lines, "#endif"] if minor else lines


def _c_enum(enum: Enum) -> Iterator[str]:
    if not enum.c_prefix:
        return
    yield ""
    for name, value in enum.members.items():
        line = f"VALUE({enum.c_prefix}{name}, {hex(value)}ULL);"
        yield from _guarded(enum.newer.get(name, 0), [line])


def _c_struct(layout: Layout) -> Iterator[str]:
    row = layout.row
    c_type = f"struct {row.c_name}"
    lines = [f"SIZE({c_type}, {layout.size});"]
    for item in layout.fields:
        c_field = item.name.rstrip("_")
        line = f"FIELD({c_type}, {c_field}, {item.offset}, {item.size});"
        lines += _guarded(row.newer.get(item.name, 0), [line])
    yield ""
    yield from _guarded(row.min_minor, lines)


# --- Program ---


def load_tables() -> list[Table]:
    """Import every table of this tree and return it."""
    tables: list[Table] = []
    for name in TABLES:
        module = importlib.import_module(name)
        path = TREE / module.OUTPUT
        tables.append(Table(name, path, module.STRUCTS, module.ENUMS, module.C_HEADER))
    return tables


def outputs() -> dict[Path, str]:
    """Return what each generated file must hold."""
    tables = load_tables()
    texts = {table.path: render_python(table) for table in tables}
    texts[TREE / ABI_FILE] = render_c(tables)
    return texts


def differences() -> str:
    """Return a unified diff from the files on disk to what they must hold; empty when fresh."""
    diff: list[str] = []
    for path, text in outputs().items():
        current = path.read_text() if path.exists() else ""
        diff += difflib.unified_diff(
            current.splitlines(keepends=True),
            text.splitlines(keepends=True),
            str(path),
            "generated",
        )
    return "".join(diff)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the generated files, or with `--check` diff them; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools.wiregen", allow_abbrev=False, description="wire codec generator"
    )
    parser.add_argument("--check", action="store_true", help="diff instead of writing")
    if parser.parse_args(arguments).check:
        diff = differences()
        sys.stdout.write(diff)
        return 1 if diff else 0
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    # The tables import this module by its package name: run that copy, whose row types theirs are.
    sys.exit(importlib.import_module("tools.wiregen").main())
