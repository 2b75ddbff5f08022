"""Generates the wire codecs and `tests/c/wire_abi.c` from the wire tables.

`fuse_table.py` and `vhost_table.py` have each structure and number of a protocol once, as rows of
the types below: `STRUCTS` (nested ones before their users), `ENUMS`, `OUTPUT` (the codec's path)
and `C_HEADER` (or None). `python -m tools.wiregen`, at the top of the checkout, writes the codecs
and assertions that compare the tables with the C headers; `--check` prints a diff instead.

For `Struct("ReadIn", ...)`, a codec has `class ReadIn(NamedTuple)`, `READ_IN` (a `struct.Struct`),
`READ_IN_SIZE` (bytes), `unpack_read_in(buf, offset=0)` and `pack_read_in(value)`, which raise
`struct.error`. `CODECS` maps each class name to its size, unpacker and packer.
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
        name: name of the Python class, such as "ReadIn".
        c_name: name of the C structure, such as "fuse_read_in"; only documentation if there is no C
            header.
        fields: `name:code` items separated by spaces. A code is one of `B H I Q b h i q` (integers
            of 1, 2, 4 and 8 bytes), `36s` (bytes of exactly that length) or the name of a structure
            earlier in the table. An item `4x` is padding, which is packed as zeros and is not a
            field. A trailing underscore, which C does not have, avoids the name of a method of
            tuples (`count_`).
        min_minor: first minor version of the protocol whose header has the structure. With an older
            header, its assertions are skipped.
        newer: for fields that are newer than the structure, the first minor version whose header
            has the field under this name.
    """

    name: str
    c_name: str
    fields: str
    min_minor: int = 0
    newer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Enum:
    """Numbers of which a wire field has one; becomes an `IntEnum`.

    Args:
        name: name of the Python class.
        members: the value of each member, by name.
        c_prefix: prefix of the names of the members in C; empty if the header does not have them.
        newer: for some members, the first minor version of the protocol whose header has them.
    """

    name: str
    members: Mapping[str, int]
    c_prefix: str = ""
    newer: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Flags(Enum):
    """Bits of which a wire field has any combination; becomes an `IntFlag`."""


@dataclass(frozen=True)
class Table:
    """A loaded table module; `path` is the file that its codec is written to."""

    module: str
    path: Path
    structs: Sequence[Struct]
    enums: Sequence[Enum]
    c_header: str | None


# --- Layout ---


class Field(NamedTuple):
    """A parsed field; `offset` and `size` are in bytes, `nested` is the layout of a structure."""

    name: str
    offset: int
    size: int
    code: str
    type_name: str
    nested: "Layout | None"


class Layout(NamedTuple):
    """A parsed structure.

    Attributes:
        row: the row that was parsed.
        fields: its fields, in order.
        codes: the `struct` codes of all leaves in order, including padding. A leaf is a field that
            is not a structure, at any depth.
        size: in bytes.
        leaves: number of leaves, without padding.
    """

    row: Struct
    fields: tuple[Field, ...]
    codes: tuple[str, ...]
    size: int
    leaves: int


_PADDING: Final = re.compile(r"[1-9][0-9]*x")
_LEAF: Final = re.compile(r"[BHIQbhiq]|[1-9][0-9]*s")


def parse_layouts(rows: Sequence[Struct]) -> dict[str, Layout]:
    """Return the layout of each structure, by Python name.

    Raises:
        ValueError: a row has an unknown code or structure, or two structures or fields of one name.
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
    # Writes "QQQII" as "3Q2I". Codes that have a count already are left as they are.
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
        '    raise ImportError("the wire codecs need a little-endian host")',
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
        # Saves a third of the time of a decode, compared with __new__ and _make of the NamedTuple.
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


# Returns the lines of the expression that makes a structure from `flat`, the leaves of the
# outermost one. The structure's own leaves begin at `start`.
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


# Yields (nested structure or None, first leaf, number of leaves) for each nested structure and for
# each run of other fields.
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
    """Return a C file that fails to compile if a table and its header differ."""
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
    """Import and return all tables of this checkout."""
    tables: list[Table] = []
    for name in TABLES:
        module = importlib.import_module(name)
        path = TREE / module.OUTPUT
        tables.append(Table(name, path, module.STRUCTS, module.ENUMS, module.C_HEADER))
    return tables


def outputs() -> dict[Path, str]:
    """Return the text that each generated file must have."""
    tables = load_tables()
    texts = {table.path: render_python(table) for table in tables}
    return texts | {TREE / ABI_FILE: render_c(tables)}


def differences() -> str:
    """Return a unified diff from the files to what they must be; empty if they are up to date."""
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
    """Write the generated files, or compare them with `--check`; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tools.wiregen",
        allow_abbrev=False,
        description="Write the wire codecs and the assertions about them from the wire tables.",
    )
    parser.add_argument("--check", action="store_true", help="print a diff instead of writing")
    if parser.parse_args(arguments).check:
        diff = differences()
        sys.stdout.write(diff)
        return 1 if diff else 0
    for path, text in outputs().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return 0


if __name__ == "__main__":
    # The tables import this module by its package name, which makes another copy of it. Run that
    # copy, because the rows are instances of its types.
    sys.exit(importlib.import_module("tools.wiregen").main())
