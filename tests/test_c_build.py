"""The C half as the compiler and the sanitizers see it."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from appliance import engine
from appliance.bench import generator

ROOT = Path(__file__).parents[1]
C_DIR = ROOT / "cffi_build"
LIB = vars(engine)["lib"]
RING_SOURCES = [C_DIR / name for name in ("ring.c", "map.c", "chain.c")]
ANSWERS = ("image_view.c", "grants.c", "places.c", "blob_fds.c", "usage.c", "answers.c")
ANSWERS_SOURCES = [C_DIR / name for name in ANSWERS]
SERVING_SOURCES = [C_DIR / name for name in ("lmdb_reader.c", "serve.c", "device.c")]
SOURCES = RING_SOURCES + ANSWERS_SOURCES + SERVING_SOURCES
# Nothing on the way of a request calls these, so they count apart: what marks pages while a guest
# is moved, and what notes the system calls that sandboxes refuse.
APART_SOURCES = [C_DIR / name for name in ("dirty_log.c", "refused.c")]
SERVING_HEADERS = {
    "answers", "barrier", "blob_fds", "engine", "grants", "image_view", "places", "statistics",
    "usage",
}  # fmt: skip
BUILDER_SOURCES = [C_DIR / "images.c", C_DIR / "castore.c"]
FRAMES_SOURCES = [*BUILDER_SOURCES, C_DIR / "frames.c"]
FOLDERS = (C_DIR, C_DIR / "fuzz")
SOURCE_NAMES = sorted(
    str(path.relative_to(C_DIR)) for folder in FOLDERS for path in folder.glob("[!_]*.c")
)
SANITIZE = [
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wconversion",
    "-Wshadow",
    "-Wvla",
    "-Wpointer-arith",
    "-Wcast-align=strict",
    "-Wcast-qual",
    "-Wstrict-prototypes",
    "-Wmissing-prototypes",
    "-Wformat=2",
    "-Wundef",
    "-Wnull-dereference",
    "-fanalyzer",
]
LOADER = """
import importlib.util, pathlib, sys
name = "appliance." + pathlib.Path(sys.argv[1]).stem
spec = importlib.util.spec_from_file_location(name, sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
"""
RUN_PYTEST = f"""{LOADER}
import pytest
import appliance.bench.generator, appliance.engine
import appliance.castore.chunking, appliance.images.builder, appliance.importer.file_reader
users = (
    appliance.bench.generator,
    appliance.castore.chunking,
    appliance.engine,
    appliance.images.builder,
    appliance.importer.file_reader,
)
assert module.lib in [user.lib for user in users]
sys.exit(pytest.main(sys.argv[2:]))
"""
OVERREAD = f"""{LOADER}
from tests.fakes.engine_rig import Rig
with Rig() as rig:
    rig.driver.add_chain([], [4096])
    rig.driver.publish()
    rig.ring.pop()
    module.lib.eng_slot_write(rig.ring._ring, 0, 0, b"x" * 64, 4096)
print("not noticed")
"""


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=300,
    )


@pytest.mark.lint
@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCE_NAMES)
def test_every_warning_is_an_error(name: str, tmp_path: Path) -> None:
    done = run(
        "gcc", "-std=gnu11", "-O2", *WARNINGS, f"-I{C_DIR}", "-c", C_DIR / name,
        "-o", tmp_path / "out.o",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sanitized(
        "_engine", [*SOURCES, *APART_SOURCES], tmp_path_factory.mktemp("sanitized"), "-llmdb"
    )


def build_sanitized(name: str, sources: list[Path], directory: Path, *libraries: str) -> Path:
    target = directory / f"{name}.so"
    emitted = run(sys.executable, C_DIR / "build_modules.py", directory)
    assert emitted.returncode == 0, emitted.stdout
    built = run(
        "gcc", "-std=gnu11", *SANITIZE, "-shared", "-fPIC", f"-I{C_DIR}",
        f"-I{sysconfig.get_path('include')}", target.with_suffix(".c"), *sources, *libraries,
        "-o", target,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout
    return target


def run_sanitized(
    script: str, extension: Path, *arguments: str
) -> subprocess.CompletedProcess[str]:
    libraries = [
        run("gcc", f"-print-file-name={name}").stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(libraries),
        # The interpreter keeps memory till its end; its own allocator would hide overruns.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(ROOT),
    }
    return run(sys.executable, "-c", script, extension, *arguments, env=env)


@pytest.mark.slow
def test_the_sanitized_build_reports_a_planted_overrun(sanitized: Path) -> None:
    done = run_sanitized(OVERREAD, sanitized)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout
    assert "eng_slot_write" in done.stdout
    assert done.returncode == 99


@pytest.mark.slow
def test_the_ring_tests_pass_under_sanitizers(sanitized: Path) -> None:
    suites = [
        f"tests/engine/test_{name}.py"
        for name in ("engine", "engine_map", "engine_hostile", "engine_recovery", "dirty_log")
    ]
    check_suites(sanitized, *suites)


@pytest.mark.slow
def test_the_answers_tests_pass_under_sanitizers(sanitized: Path) -> None:
    check_suites(sanitized, "tests/worker", "tests/store/test_store_reader.py")


@pytest.mark.slow
def test_the_file_reader_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    extension = build_sanitized("_reader", [C_DIR / "reader.c", C_DIR / "files.c"], tmp_path)
    suites = ["tests/importer/test_file_reader.py", "tests/importer/test_hasher.py"]
    check_suites(extension, *suites)


@pytest.mark.slow
def test_the_image_builder_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    extension = build_sanitized("_images", FRAMES_SOURCES, tmp_path)
    check_suites(extension, "tests/images/test_builder.py", "tests/nix/test_nar_frames.py")


@pytest.mark.slow
def test_the_tests_of_chunks_pass_under_sanitizers(tmp_path: Path) -> None:
    extension = build_sanitized("_fastcdc", [C_DIR / "fastcdc.c"], tmp_path)
    check_suites(extension, "tests/castore/test_chunking.py")


@pytest.mark.slow
def test_the_load_generator_tests_pass_under_sanitizers(tmp_path: Path) -> None:
    sources = [C_DIR / "bench_ring.c", C_DIR / "bench_calls.c"]
    extension = build_sanitized("_bench", sources, tmp_path)
    check_suites(extension, "tests/bench/test_generator.py")


def check_suites(extension: Path, *suites: str) -> None:
    done = run_sanitized(RUN_PYTEST, extension, "-q", "-p", "no:cacheprovider", *suites)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d\d passed", done.stdout)
    assert "Sanitizer" not in done.stdout


def test_every_error_code_has_a_text() -> None:
    codes = {name for name in dir(LIB) if name.startswith("ENG_E")}
    texts = engine._RULES.keys() | engine._MISUSES.keys()
    assert len(codes) > 20
    assert {getattr(LIB, name) for name in codes} == texts


def test_the_stub_names_what_the_load_generator_has() -> None:
    stub = (ROOT / "appliance" / "_bench.pyi").read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:bench_\w+(?=\()|BENCH_[A-Z_]+)", stub))
    assert len(names) > 20
    assert names <= set(dir(vars(generator)["lib"]))


def test_the_stub_names_what_the_module_has() -> None:
    stub = (ROOT / "appliance" / "_engine.pyi").read_text(encoding="utf-8")
    names = set(re.findall(r"\b(?:eng_\w+(?=\()|ENG_[A-Z_]+)", stub))
    assert len(names) > 30
    assert names <= set(dir(LIB))


def uses(source: Path, definers: dict[str, str]) -> set[str]:
    """Return the C files that define functions which `source` calls, other than itself."""
    called = set(re.findall(r"\b(\w+)\(", source.read_text()))
    return {definers[name] for name in called & definers.keys()} - {source.name}


@pytest.mark.lint
def test_what_serves_requests_is_small() -> None:
    """Lines of code: without comments and empty lines, and with the headers."""
    headers = [path for path in C_DIR.glob("*.h") if path.stem in SERVING_HEADERS]
    assert len(headers) == len(SERVING_HEADERS)
    num_lines = {path.name: len(path.read_text().splitlines()) for path in [*SOURCES, *headers]}
    assert max(num_lines.values()) <= 450, num_lines
    num_code = 0
    for path in [*SOURCES, *headers]:
        # Comments go; directives, macros and includes stay as they are.
        code = run("gcc", "-fpreprocessed", "-dD", "-E", "-P", path)
        assert code.returncode == 0, code.stdout
        num_code += sum(bool(line.strip()) for line in code.stdout.splitlines())
    print(f"{num_code} lines of code, {sum(num_lines.values())} lines")
    assert num_code <= 2500
    assert all(len(path.read_text().splitlines()) <= 100 for path in APART_SOURCES)
    called = {name for path in SOURCES for name in re.findall(r"\b(\w+)\(", path.read_text())}
    assert not called & {"eng_log_guest", "eng_log_slot"}


@pytest.mark.lint
def test_no_c_files_use_each_other() -> None:
    # A definition begins a line, and its body is a brace at the start of a later one.
    definition = re.compile(r"^(?!static)[a-z][\w *]*?\b(\w+)\([^;{]*\)\n\{", re.MULTILINE)
    definers = {
        name: path.name for path in SOURCES for name in definition.findall(path.read_text())
    }
    assert {"eng_ring_pop", "eng_answer", "eng_map_add"} <= definers.keys()
    left = {path.name: uses(path, definers) for path in SOURCES}
    while free := [name for name, used in left.items() if not used & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}
