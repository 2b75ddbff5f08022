"""Programs that tell files apart by their inode numbers, on a tree with equal ones.

Each result is held against the original, where equal files are not one.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.overlaid import overlay

pytestmark = pytest.mark.slow

# Compiles only if both directories are searched: "common.h" of the second after that of the first.
NEXT = """
#ifndef FIRST_SEEN
#define FIRST_SEEN
#include_next <common.h>
#else
enum { SECOND_SEEN = 1 };
#endif
"""
# Each includes the "local.h" beside it.
BESIDE = '#include "local.h"\n'
PROGRAMS = {
    "next.c": "#include <common.h>\nint main(void) { return SECOND_SEEN - 1; }\n",
    "beside.c": '#include "a/beside.h"\n#include "b/beside.h"\n'
    "int main(void) { return LOCAL_A + LOCAL_B - 3; }\n",
}
DIGEST = "user.tvix.castore.blob.digest"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)
    assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    assert done.stderr == "", command
    return done.stdout


def git(tree: Path, *words: str) -> str:
    settings = {"safe.directory": "*", "user.name": "t", "user.email": "t@example.org"}
    options = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
    return run("env", "GIT_OPTIONAL_LOCKS=0", "git", *options, *words, cwd=tree)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("original") / "tree"
    for name in ("a", "b"):
        write(tree / "equal" / name / "one", "text")
        write(tree / "equal" / name / "two", "text")
        write(tree / "equal" / name / "empty", "")
        write(tree / "equal" / name / "below" / "deep" / "file", "text")
        (tree / "equal" / name / "link").symlink_to("one")
        write(tree / "include" / name / "common.h", NEXT)
        write(tree / "headers" / name / "beside.h", BESIDE)
        write(
            tree / "headers" / name / "local.h",
            f"enum {{ LOCAL_{name.upper()} = {ord(name) - 96} }};\n",
        )
    for name, text in PROGRAMS.items():
        write(tree / "headers" / name, text)
    write(tree / "repository" / "__init__.py", "")
    write(tree / "repository" / "package" / "__init__.py", "")
    write(tree / "repository" / "package" / "other" / "__init__.py", "")
    git(tree / "repository", "init", "--quiet")
    git(tree / "repository", "add", "--all")
    git(tree / "repository", "commit", "--quiet", "--message", "everything")
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() or path.stat().st_mode & 0o100 else 0o444)
        os.utime(path, (1, 1), follow_symlinks=False)
    return tree


@pytest.fixture(scope="module")
def tree(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("mounted")
    (name,) = import_tree(directory / "store", original)
    (directory / "mnt").mkdir()
    with Mounted(directory / "store", directory / "mnt") as mounted:
        yield mounted.path / name


@pytest.fixture(params=["mount", "overlay"])
def seen(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> Iterator[Path]:
    if request.param == "mount":
        yield tree
        return
    with overlay(tree, tmp_path / "overlaid") as merged:
        yield merged


def check_copy(copy: Path, original: Path) -> None:
    assert run("diff", "-r", "--no-dereference", original, copy) == ""
    assert run("find", copy, "-type", "f", "-links", "+1") == ""


@pytest.mark.parametrize(
    "command",
    [
        ["cp", "-r"],
        ["cp", "-a"],
        ["cp", "-a", "--preserve=all"],
        ["rsync", "-aHX"],
        ["rsync", "-aH", "--no-inc-recursive", "--checksum"],
    ],
    ids=" ".join,
)
def test_a_copy_has_all_and_no_hard_links(
    seen: Path, original: Path, tmp_path: Path, command: list[str]
) -> None:
    run(*command, seen / "equal", tmp_path / "copied")
    copy = tmp_path / "copied" / ("equal" if command[0] == "rsync" else "")
    check_copy(copy, original / "equal")
    for path in copy.rglob("*"):
        assert os.listxattr(path, follow_symlinks=False) == []


def test_directories_named_together_are_all_copied(
    seen: Path, original: Path, tmp_path: Path
) -> None:
    # cp says "will not create hard link" of what it takes for a directory that it has copied.
    (tmp_path / "copy").mkdir()
    run("cp", "-r", seen / "equal" / "a", seen / "equal" / "b", tmp_path / "copy")
    check_copy(tmp_path / "copy", original / "equal")


def test_du_counts_everything_once(seen: Path, original: Path) -> None:
    def counted(path: Path) -> list[str]:
        inodes = run("du", "--inodes", "-s", "equal/a", "equal/b", "equal", cwd=path)
        inodes += run("du", "--inodes", ".", cwd=path / "equal" / "a")
        # Directories have sizes of their own on each file system.
        apart = run("du", "-ab", "equal", cwd=path).splitlines()
        files = [line for line in apart if not (path / line.split("\t")[1]).is_dir()]
        return [*inodes.splitlines(), *sorted(files)]

    assert counted(seen) == counted(original)


def test_tar_archives_no_hard_links(seen: Path, original: Path) -> None:
    def archive(path: Path) -> str:
        # One mode for all: the mount's symlinks have 0444, where Linux shows 0777 for its own.
        options = ("--sort=name", "--mode=0777", "--numeric-owner", "-C", str(path))
        made = subprocess.run(["tar", "-c", *options, "equal"], check=True, stdout=subprocess.PIPE)
        listed = subprocess.run(["tar", "-tv"], input=made.stdout, check=True, capture_output=True)
        assert not re.search(rb"^h", listed.stdout, re.MULTILINE)
        return hashlib.sha256(made.stdout).hexdigest()

    assert archive(seen) == archive(original)


def test_find_knows_only_one_name_of_a_file(seen: Path) -> None:
    for name in ("a/one", "b/two", "a/empty", "b/below", "a/link"):
        path = seen / "equal" / name
        assert run("find", "-P", seen, "-samefile", path) == f"{path}\n"


def test_equal_files_are_not_the_same_file(seen: Path) -> None:
    for one, other in (("a", "b"), ("a/one", "b/one"), ("a/one", "a/two"), ("a/below", "b/below")):
        assert not (seen / "equal" / one).samefile(seen / "equal" / other)
    done = subprocess.run(["test", seen / "equal/a/one", "-ef", seen / "equal/a/two"], check=False)
    assert done.returncode == 1


@pytest.mark.parametrize(
    "command",
    [
        # gcc leaves out directories that it takes for one it searches already.
        ["gcc", "-Iinclude/a", "-Iinclude/b", "-x", "c", "headers/next.c"],
        ["gcc", "headers/beside.c"],
        ["gcc", "-E", "-P", "headers/beside.c"],
        ["gcc", "-M", "headers/beside.c"],
    ],
    ids=["include_next", "beside", "preprocessed", "dependencies"],
)
def test_gcc_finds_the_right_one_of_equal_headers(
    seen: Path, original: Path, tmp_path: Path, command: list[str]
) -> None:
    outputs = []
    for path in (original, seen):
        made = tmp_path / "made"
        run(*command, "-o", made, cwd=path)
        outputs.append(made.read_bytes())
    if outputs[0][:4] == b"\x7fELF":
        run(tmp_path / "made")
    assert outputs[0] == outputs[1]


def test_a_compiler_that_keeps_files_by_inode_finds_all_headers(seen: Path) -> None:
    # As clang does: what has been seen under one name is opened under that name ever after, and
    # with it what is beside it.
    kept: dict[tuple[int, int], Path] = {}
    for name in ("a/beside.h", "b/beside.h", "a/local.h", "b/local.h"):
        path = seen / "headers" / name
        status = path.stat()
        assert kept.setdefault((status.st_dev, status.st_ino), path) == path


def test_git_sees_one_change_where_one_was_made(tree: Path, tmp_path: Path) -> None:
    assert git(tree / "repository", "status", "--porcelain") == ""
    git(tree / "repository", "fsck", "--strict")
    with overlay(tree, tmp_path / "overlaid") as merged:
        repository = merged / "repository"
        assert git(repository, "status", "--porcelain") == ""
        with (repository / "package" / "__init__.py").open("a") as file:
            file.write("changed\n")
        assert git(repository, "status", "--porcelain") == " M package/__init__.py\n"
        git(repository, "commit", "--quiet", "--all", "--message", "changed")
        git(repository, "fsck", "--strict")
        run("rm", "-r", repository / "package")
        assert git(repository, "status", "--porcelain").splitlines() == [
            " D package/__init__.py",
            " D package/other/__init__.py",
        ]
    assert (tree / "repository" / "package" / "__init__.py").read_text() == ""


def test_the_root_lists_nothing_where_it_is_not_to_be_listed(tree: Path, tmp_path: Path) -> None:
    # Not an error: a program that walks over a mount or an overlay would end there.
    assert run("ls", "-a", tree.parent) == ".\n..\n"
    assert run("find", tree.parent) == f"{tree.parent}\n"
    assert (tree.parent / tree.name).is_dir()
    with overlay(tree.parent, tmp_path / "overlaid") as merged:
        assert run("ls", merged) == ""
        (merged / "new").touch()
        assert run("ls", merged) == "new\n"
        assert (merged / tree.name / "equal").is_dir()


def test_digests_are_told_and_not_listed(tree: Path) -> None:
    path = tree / "equal" / "a" / "one"
    digest = run("getfattr", "--absolute-names", "--only-values", "-n", DIGEST, path)
    assert digest.startswith("b3:")
    assert run("getfattr", "--absolute-names", "-d", "-m", "-", path, tree) == ""
    assert os.listxattr(path) == []
