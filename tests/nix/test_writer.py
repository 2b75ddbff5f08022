"""The NAR writer, against `nix-store --dump`."""

import os
import subprocess
from pathlib import Path

import pytest

from appliance.errors import NarError
from appliance.nix.nar import Buffer, NarWriter

PIECE = 1000


class Collected:
    def __init__(self) -> None:
        self.buffers: list[bytes] = []
        self.writer = NarWriter(self._take)

    def _take(self, data: Buffer) -> None:
        self.buffers.append(bytes(data))

    def nar(self) -> bytes:
        size = self.writer.finish()
        nar = b"".join(self.buffers)
        assert len(nar) == size
        return nar


def write_tree(writer: NarWriter, path: Path, *, in_pieces: bool) -> None:
    if path.is_symlink():
        writer.symlink(os.fsencode(path.readlink()))
    elif path.is_dir():
        writer.directory()
        for name, child in sorted((os.fsencode(child.name), child) for child in path.iterdir()):
            writer.entry(name)
            write_tree(writer, child, in_pieces=in_pieces)
        writer.end_directory()
    else:
        content = path.read_bytes()
        executable = path.stat().st_mode & 0o100 != 0
        if not in_pieces:
            writer.file(content, executable=executable)
            return
        writer.regular(len(content), executable=executable)
        for start in range(0, len(content), PIECE):
            writer.content(memoryview(content)[start : start + PIECE])


def dump(path: Path) -> bytes:
    return subprocess.run(["nix-store", "--dump", path], check=True, capture_output=True).stdout


def make_tree(top: Path) -> None:
    top.mkdir()
    for size in [0, 1, 7, 8, 9, 15, 16, 999, 1000, 1001, 8191]:
        (top / f"size{size}").write_bytes(os.urandom(size))
    for name in ["a", "a-b", "a.b", "ab", "A", "Ä", ".hidden", "n" * 255]:
        (top / name).write_bytes(name.encode())
    (top / "executable").write_bytes(b"#!/bin/sh\n")
    (top / "executable").chmod(0o755)
    (top / "empty").mkdir()
    (top / "deep" / "deeper" / "deepest").mkdir(parents=True)
    (top / "deep" / "deeper" / "deepest" / "file").write_bytes(b"at the bottom")
    (top / "deep" / "link").symlink_to("deeper/deepest")
    (top / "dangling").symlink_to("/nowhere/" + "x" * 100)
    os.close(os.open(os.fsencode(top) + b"/\xff\xfe", os.O_CREAT | os.O_WRONLY))


@pytest.mark.parametrize("in_pieces", [False, True])
def test_nar_of_a_tree_is_the_one_of_nix(tmp_path: Path, in_pieces: bool) -> None:  # noqa: FBT001 -- a pytest parameter
    make_tree(tmp_path / "tree")
    path = tmp_path / "tree"
    collected = Collected()
    write_tree(collected.writer, path, in_pieces=in_pieces)
    assert collected.nar() == dump(path)


@pytest.mark.parametrize("name", ["size0", "size1", "size8", "executable", "dangling", "empty"])
def test_nar_of_a_root_that_is_no_full_directory_is_the_one_of_nix(
    tmp_path: Path, name: str
) -> None:
    make_tree(tmp_path / "tree")
    path = tmp_path / "tree" / name
    collected = Collected()
    write_tree(collected.writer, path, in_pieces=True)
    assert collected.nar() == dump(path)


def test_wide_directory_is_written_in_bounded_buffers() -> None:
    collected = Collected()
    writer = collected.writer
    writer.directory()
    for number in range(5000):
        writer.entry(b"%05d" % number)
        writer.symlink(b"target")
    writer.end_directory()
    nar = collected.nar()
    assert max(map(len, collected.buffers)) < len(nar) / 10


def test_more_content_than_stated_is_refused() -> None:
    writer = Collected().writer
    writer.regular(3, executable=False)
    writer.content(b"ab")
    with pytest.raises(NarError):
        writer.content(b"cd")
