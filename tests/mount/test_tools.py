"""Programs of every day on a mounted tree, each result held against the original."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted

pytestmark = pytest.mark.slow

PROGRAM = "extern int seven(void);\nint main(void) { return seven() == 7 ? 0 : 1; }\n"
LIBRARY = "int seven(void) { return 7; }\n"
SOURCES = {
    "package/__init__.py": "",
    "package/one.py": "from package.two import VALUE\n\nANSWER = VALUE + 1\n",
    "package/two.py": "VALUE = 41\n",
}


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> bytes:
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | (env or {}), check=False, capture_output=True
    )
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("original") / "tree"
    for name, text in SOURCES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    (tree / "many").mkdir()
    for number in range(2000):
        (tree / "many" / f"{number}").write_text("x" * number)
    (tree / "large").write_bytes(os.urandom(5 << 20))
    (tree / "link").symlink_to("many/7")
    (tree / "package" / "nowhere").symlink_to("../absent")
    (tree / "bin").mkdir()
    (tree / "bin" / "seven.c").write_text(LIBRARY)
    (tree / "bin" / "program.c").write_text(PROGRAM)
    run("gcc", "-shared", "-fPIC", "-o", "libseven.so", "seven.c", cwd=tree / "bin")
    link = ("-L.", "-lseven", "-Wl,-rpath,$ORIGIN")
    run("gcc", "-o", "program", "program.c", *link, cwd=tree / "bin")
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")
    git(tree, "commit", "--quiet", "--message", "everything")
    # What the store keeps of a mode; as umask 222 would have made them.
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444)
        os.utime(path, (1, 1), follow_symlinks=False)
    return tree


def git(tree: Path, *words: str) -> bytes:
    settings = {"safe.directory": "*", "user.name": "t", "user.email": "t@example.org"}
    options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    # A read-only tree's index cannot be refreshed in place.
    return run("git", *options, *words, cwd=tree, env={"GIT_OPTIONAL_LOCKS": "0"})


@pytest.fixture(scope="module", params=[[], ["--passthrough"]], ids=["plain", "passthrough"])
def tree(
    request: pytest.FixtureRequest, original: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("mounted")
    (name,) = import_tree(directory / "store", original)
    (directory / "mnt").mkdir()
    options: Sequence[str] = request.param
    with Mounted(directory / "store", directory / "mnt", *options) as mounted:
        yield mounted.path / name


def listing(tree: Path) -> list[bytes]:
    # Links, blocks, directory sizes and inode numbers are the file system's own.
    fields = "%y %m %U %G %T@ %P %l\\n"
    lines = run("find", tree, "-printf", fields).splitlines()
    sizes = run("find", tree, "-type", "f", "-printf", "%s %P\\n").splitlines()
    return sorted([line for line in lines if not line.startswith(b"l")] + sizes)


def test_find_sees_the_original(tree: Path, original: Path) -> None:
    assert listing(tree) == listing(original)
    assert len(run("find", tree, "-ls").splitlines()) == len(listing(tree)) - sum(
        path.is_file() and not path.is_symlink() for path in original.rglob("*")
    ) + sum(path.is_symlink() for path in original.rglob("*"))


def test_diff_finds_no_difference(tree: Path, original: Path) -> None:
    assert run("diff", "-r", "--no-dereference", original, tree) == b""


def test_tar_makes_the_same_archive(tree: Path, original: Path) -> None:
    def archive(path: Path) -> bytes:
        # One mode for all: the mount's symlinks have 0444, where Linux shows 0777 for its own.
        options = ("--sort=name", "--mode=0777", "--numeric-owner")
        return hashlib.sha256(run("tar", "-c", *options, "-C", path, ".")).digest()

    assert archive(tree) == archive(original)


def test_rsync_copies_and_then_finds_nothing_to_do(
    tree: Path, original: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    run("rsync", "--archive", f"{tree}/", copy)
    assert run("rsync", "-ai", "--checksum", "--delete", f"{original}/", copy) == b""
    # Not -p, which cannot agree on symlinks; test_find_sees_the_original compares modes.
    options = ("-rltni", "--checksum", "--delete")
    assert run("rsync", *options, f"{tree}/", f"{original}/") == b""


def test_git_sees_a_clean_work_tree(tree: Path) -> None:
    assert git(tree, "status", "--porcelain") == b""
    assert git(tree, "diff", "HEAD") == b""
    git(tree, "fsck", "--strict")


def test_cp_copies_all(tree: Path, original: Path, tmp_path: Path) -> None:
    run("cp", "-a", tree, tmp_path / "copy")
    assert run("diff", "-r", "--no-dereference", original, tmp_path / "copy") == b""
    assert listing(tmp_path / "copy") == listing(original)


def test_a_program_and_its_library_run_from_the_mount(tree: Path) -> None:
    run(tree / "bin" / "program")


def test_getfattr_shows_the_digests(tree: Path) -> None:
    for name, prefix in (
        ("user.snix.castore.blob.digest", "blake3-"),
        ("user.tvix.castore.blob.digest", "b3:"),
    ):
        output = run("getfattr", "--name", name, "--absolute-names", tree / "large").decode()
        assert f'{name}="{prefix}' in output
    for dumped in ("large", "link", "bin"):
        assert run("getfattr", "--no-dereference", "--dump", "-m", "-", tree / dumped) == b""


@contextmanager
def overlay(lower: Path, directory: Path) -> Iterator[Path]:
    for name in ("over", "merged"):
        (directory / name).mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", directory / "over")
    try:
        for name in ("upper", "work"):
            (directory / "over" / name).mkdir()
        where = f"lowerdir={lower},upperdir={directory}/over/upper,workdir={directory}/over/work"
        run("mount", "-t", "overlay", "overlay", "-o", where, directory / "merged")
        try:
            yield directory / "merged"
        finally:
            run("umount", directory / "merged")
    finally:
        run("umount", directory / "over")


def test_an_overlay_can_be_written_and_the_mount_stays(
    tree: Path, original: Path, tmp_path: Path
) -> None:
    with overlay(tree, tmp_path) as merged:
        (merged / "new").write_text("new")
        with (merged / "many" / "9").open("a") as file:  # copied up
            file.write("and more")
        (merged / "many" / "10").unlink()
        (merged / "many" / "11").rename(merged / "moved")
        (merged / "package" / "sub").mkdir()
        (merged / "many" / "12").chmod(0o600)
        assert (merged / "new").read_text() == "new"
        assert (merged / "many" / "9").read_text() == "x" * 9 + "and more"
        assert not (merged / "many" / "10").exists()
        assert (merged / "moved").read_text() == "x" * 11
        assert len(list((merged / "many").iterdir())) == 1998
        run("rm", "-r", merged / "many")
        (merged / "many").mkdir()
        assert list((merged / "many").iterdir()) == []
        assert (merged / "large").read_bytes() == (original / "large").read_bytes()
    assert run("diff", "-r", "--no-dereference", original, tree) == b""


def test_compileall_reads_through_an_overlay(tree: Path, tmp_path: Path) -> None:
    with overlay(tree, tmp_path) as merged:
        run(sys.executable, "-m", "compileall", "-q", merged / "package")
        assert len(list((merged / "package" / "__pycache__").iterdir())) == 3
        program = "from package.one import ANSWER; assert ANSWER == 42"
        run(sys.executable, "-c", program, cwd=merged)
