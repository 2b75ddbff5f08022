import importlib.util
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools import fuse_table, wiregen
from tools.wiregen import Enum, Flags, Struct, Table

TREE = Path(wiregen.__file__).parent.parent

NESTED = (
    Struct("Inner", "inner", "a:H 2x b:i"),
    Struct("Outer", "outer", "head:Q one:Inner tag:4s two:Inner count_:B 7x"),
    Struct("Shell", "shell", "outer:Outer"),
    Struct("InnerPairOfTwoInners", "inner_pair", "one:Inner two:Inner"),
)


def table(structs: tuple[Struct, ...], enums: tuple[Enum, ...] = ()) -> Table:
    return Table("some.table", Path("_scratch_wire.py"), structs, enums, "linux/fuse.h")


def load(source: str, path: Path) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("scratch_wire", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_c(source: str) -> subprocess.CompletedProcess[str]:
    command = ["gcc", "-x", "c", "-std=gnu11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-"]
    return subprocess.run(command, input=source, capture_output=True, text=True, check=False)


def ruff(source: str, *arguments: str) -> str:
    command = [
        sys.executable,
        "-m",
        "ruff",
        *arguments,
        "--stdin-filename",
        "_scratch_wire.py",
        "-",
    ]
    done = subprocess.run(
        command, input=source, capture_output=True, text=True, check=False, cwd=TREE
    )
    return done.stdout + done.stderr if done.returncode else ""


def test_generated_files_are_fresh() -> None:
    assert wiregen.differences() == ""


def test_checked_in_abi_file_compiles_against_the_installed_header() -> None:
    done = compile_c((TREE / wiregen.ABI_FILE).read_text())
    assert done.returncode == 0, done.stderr


def test_swapped_fields_fail_to_compile_with_the_fields_name() -> None:
    good = Struct("OutHeader", "fuse_out_header", "len:I error:i unique:Q")
    bad = Struct("OutHeader", "fuse_out_header", "error:i len:I unique:Q")
    assert compile_c(wiregen.render_c([table((good,))])).returncode == 0
    done = compile_c(wiregen.render_c([table((bad,))]))
    assert done.returncode != 0
    assert "fuse_out_header" in done.stderr
    assert "error" in done.stderr


def test_wrong_number_fails_to_compile() -> None:
    enum = Enum("Opcode", {"LOOKUP": 2}, c_prefix="FUSE_")
    done = compile_c(wiregen.render_c([table((), (enum,))]))
    assert done.returncode != 0
    assert "FUSE_LOOKUP" in done.stderr


def test_rows_newer_than_the_header_are_skipped() -> None:
    rows = (
        Struct("Newer", "fuse_of_the_future", "a:I", min_minor=9999),
        Struct("OutHeader", "fuse_out_header", "late:I error:i unique:Q", newer={"late": 9999}),
    )
    enum = Enum("Opcode", {"TELEPORT": 99}, c_prefix="FUSE_", newer={"TELEPORT": 9999})
    done = compile_c(wiregen.render_c([table(rows, (enum,))]))
    assert done.returncode == 0, done.stderr


def test_header_knows_all_but_the_newest_rows() -> None:
    text = wiregen.render_c(wiregen.load_tables())
    for row in fuse_table.STRUCTS:
        if row.min_minor <= 36:
            assert f"SIZE(struct {row.c_name}," in text


@pytest.mark.slow
def test_generated_code_is_formatted_and_clean() -> None:
    enums = (Enum("Number", {"ONE": 1, "TWO": 2}), Flags("Bit", {"HIGH": 1 << 63}))
    sources = [wiregen.render_python(table(NESTED, enums))]
    sources += [wiregen.render_python(one) for one in wiregen.load_tables()]
    for source in sources:
        assert ruff(source, "format", "--diff") == ""
        assert ruff(source, "check") == ""


def test_generated_module_without_enums_imports_none(tmp_path: Path) -> None:
    source = wiregen.render_python(table(NESTED))
    assert "enum" not in source
    assert load(source, tmp_path / "_scratch_wire.py").INNER_SIZE == 8


def test_nested_structures_pack_in_place_and_padding_is_zero(tmp_path: Path) -> None:
    wire = load(wiregen.render_python(table(NESTED)), tmp_path / "_scratch_wire.py")
    outer = wire.Outer(1, wire.Inner(2, -3), b"abcd", wire.Inner(4, 5), 6)
    data = wire.pack_outer(outer)
    assert data == (b"\1\0\0\0\0\0\0\0\2\0\0\0\xfd\xff\xff\xffabcd\4\0\0\0\5\0\0\0\6" + bytes(7))
    assert wire.unpack_outer(b"\xff" * 3 + data, 3) == outer
    assert type(wire.unpack_outer(data).one) is wire.Inner
    shell = wire.Shell(outer)
    assert wire.pack_shell(shell) == data
    assert wire.unpack_shell(data) == shell
    assert type(wire.unpack_shell(data).outer.two) is wire.Inner
    assert wire.CODECS["Shell"] == (36, wire.unpack_shell, wire.pack_shell)


def test_padding_is_not_read(tmp_path: Path) -> None:
    wire = load(wiregen.render_python(table(NESTED)), tmp_path / "_scratch_wire.py")
    assert wire.unpack_inner(b"\2\0\xee\xee\5\0\0\0") == wire.Inner(2, 5)


def test_short_buffers_and_large_numbers_raise(tmp_path: Path) -> None:
    wire = load(wiregen.render_python(table(NESTED)), tmp_path / "_scratch_wire.py")
    with pytest.raises(struct.error):
        wire.unpack_outer(bytes(wire.OUTER_SIZE - 1))
    with pytest.raises(struct.error):
        wire.pack_inner(wire.Inner(1 << 16, 0))


@pytest.mark.parametrize(
    "rows",
    [
        (Struct("A", "a", "x:Z"),),
        (Struct("A", "a", "x:I x:I"),),
        (Struct("A", "a", "x:I"), Struct("A", "a", "x:I")),
        (Struct("A", "a", "0x"),),
        (Struct("A", "a", "late:Later"), Struct("Later", "later", "x:I")),
    ],
)
def test_bad_rows_are_refused(rows: tuple[Struct, ...]) -> None:
    with pytest.raises(ValueError, match="structure"):
        wiregen.parse_layouts(rows)


@pytest.mark.slow
def test_check_reports_a_stale_file_and_a_run_repairs_it(tmp_path: Path) -> None:
    for part in ("appliance", "tools"):
        shutil.copytree(TREE / part, tmp_path / part)
    (tmp_path / "tests" / "c").mkdir(parents=True)
    command = [sys.executable, "-B", "-m", "tools.wiregen"]
    stale = tmp_path / "appliance" / "fuse_proto" / "_fuse_wire.py"
    fresh = stale.read_text()
    stale.write_text(fresh.replace("LOOKUP = 1\n", "LOOKUP = 7\n"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    done = run("--check")
    assert done.returncode == 1, done.stderr
    assert "-    LOOKUP = 7\n+    LOOKUP = 1\n" in done.stdout
    assert run().returncode == 0
    assert stale.read_text() == fresh
    assert run("--check").returncode == 0


def test_generator_runs_when_the_generated_module_is_missing(tmp_path: Path) -> None:
    for part in ("appliance", "tools"):
        shutil.copytree(TREE / part, tmp_path / part)
    target = tmp_path / "appliance" / "fuse_proto" / "_fuse_wire.py"
    fresh = target.read_text()
    target.unlink()
    done = subprocess.run(
        [sys.executable, "-B", "-m", "tools.wiregen"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert target.read_text() == fresh
