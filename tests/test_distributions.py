"""What others install: a wheel of the tree, and one of the source distribution.

Nothing is downloaded: both are built with the tools of this environment, and installed into a new
one that borrows the packages they depend on from here.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.fakes.finished_program import output_of
from tests.fakes.installed_wheel import install

PROJECT: Final = Path(__file__).resolve().parents[1]
NOT_SOURCE: Final = shutil.ignore_patterns(
    ".?*", "build", "dist", "*.egg-info", "__pycache__", "*.so"
)

pytestmark = pytest.mark.slow


def build(kind: str, source: Path, directory: Path) -> Path:
    """Build the wheel or the sdist of `source`, and return it."""
    output_of(
        *(sys.executable, "-m", "build", "--no-isolation", f"--{kind}"),
        *("--outdir", directory, source),
        cwd=directory,
    )
    (built,) = directory.glob("appliance-*.*")
    return built


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the tree, for a build writes into it."""
    return shutil.copytree(
        PROJECT, tmp_path_factory.mktemp("copied") / "appliance", ignore=NOT_SOURCE
    )


@pytest.fixture(scope="module")
def unpacked(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what the source distribution holds."""
    directory = tmp_path_factory.mktemp("sdist")
    output_of("tar", "-xf", build("sdist", copied, directory), cwd=directory)
    return next(path for path in directory.iterdir() if path.is_dir())


@pytest.mark.parametrize("source", ["copied", "unpacked"])
def test_what_is_built_imports_a_tree(
    source: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "wheel").mkdir()
    wheel = build("wheel", request.getfixturevalue(source), tmp_path / "wheel")
    programs = install(wheel, tmp_path / "installed")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "tree" / "directory").mkdir(parents=True)
    (elsewhere / "tree" / "directory" / "file").write_text("content")

    place = output_of(
        *(programs / "python", "-P", "-c", "import appliance; print(appliance.__file__)"),
        cwd=elsewhere,
    )
    assert Path(place).is_relative_to(tmp_path / "installed")
    store = ("--store", f"lmdb://{elsewhere}/store")
    path = output_of(programs / "appliance", "import", *store, "tree", cwd=elsewhere).strip()
    assert path.endswith("-tree")
    file = f"{path}/directory/file"
    assert output_of(programs / "appliance", "cat", *store, file, cwd=elsewhere) == "content"
    assert {"mount.appliance", "mount.fuse.appliance", "appliance-virtiofsd"} <= {
        program.name for program in programs.iterdir()
    }
    description = tmp_path / "installed" / "share" / "qemu" / "vhost-user" / "60-appliance.json"
    described = json.loads(description.read_text())
    printed = output_of(programs / "appliance-virtiofsd", "--print-capabilities", cwd=elsewhere)
    assert {"type": described["type"], "features": described["features"]} == json.loads(printed)
    assert Path(described["binary"]).name == "appliance-virtiofsd"


def files_of(directory: Path) -> set[Path]:
    return {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}


def test_a_source_distribution_is_the_whole_source(copied: Path, unpacked: Path) -> None:
    made = {path for path in files_of(copied) if path.parts[0] in {"appliance.egg-info", "build"}}
    assert files_of(copied) - made <= files_of(unpacked)
