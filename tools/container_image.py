"""Builds a container image of this checkout: `python -m tools.container_image DIRECTORY`.

The description is share/container/Containerfile. Buildah follows it, without a daemon; what the
image is based on comes from debootstrap in place of a registry. The result is an archive of an OCI
image, which `podman load` and others take. This needs root.

Source: buildah-build(1); OCI Image Format Specification 1.0.2.
"""

import sys
import tempfile
from pathlib import Path
from typing import Final

from appliance import __version__
from tools import debian_package
from tools.other_programs import run

TREE: Final = Path(__file__).resolve().parents[1]
NAME: Final = f"localhost/appliance:{__version__}"
_DESCRIPTION: Final = TREE / "share" / "container" / "Containerfile"
_BASE: Final = "localhost/base"
_RELEASE: Final = "bookworm"
# In a chroot of its own, so that no container runtime is needed; layers are whole directories.
_ENVIRONMENT: Final = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": "vfs"}


class Buildah:
    """Buildah with images and containers of its own.

    Args:
        directory: where it keeps them.
    """

    def __init__(self, directory: Path) -> None:
        self._places = (f"--root={directory / 'images'}", f"--runroot={directory / 'run'}")

    def command(self, *words: str | Path) -> list[str]:
        """Return the command line that runs a command of Buildah."""
        variables = [f"{name}={value}" for name, value in _ENVIRONMENT.items()]
        return ["env", *variables, "buildah", *self._places, *map(str, words)]

    def run(self, *words: str | Path) -> str:
        """Run a command of Buildah and return what it prints; end the program if it fails."""
        return run(*self.command(*words))


def build_image(buildah: Buildah, directory: Path) -> None:
    """Build the image, which is then known to `buildah` as `NAME`.

    Args:
        buildah: receives the image.
        directory: for what is needed on the way.
    """
    root = directory / "base"
    run("debootstrap", "--variant=minbase", _RELEASE, root)
    container = buildah.run("from", "scratch").strip()
    buildah.run("add", "--quiet", container, root, "/")
    buildah.run("commit", "--quiet", "--rm", container, _BASE)
    context = directory / "context"
    debian_package.build(context, is_compressed=False)
    buildah.run(
        *("build", "--build-arg", f"BASE={_BASE}", "--pull-never"),
        *("--file", _DESCRIPTION, "--tag", NAME, context),
    )


def main(words: list[str]) -> None:
    """Build the archive in the directory that is named, and print its path."""
    if len(words) != 1:
        sys.exit("usage: python -m tools.container_image DIRECTORY")
    directory = Path(words[0])
    directory.mkdir(parents=True, exist_ok=True)
    archive = directory / f"appliance-{__version__}.oci.tar"
    with tempfile.TemporaryDirectory(prefix="appliance-container-") as temporary:
        buildah = Buildah(Path(temporary))
        build_image(buildah, Path(temporary))
        new = archive.with_suffix(".new")
        new.unlink(missing_ok=True)
        buildah.run("push", "--quiet", NAME, f"oci-archive:{new}:{NAME}")
        new.replace(archive)
    print(archive)  # noqa: T201 - what the caller asked for


if __name__ == "__main__":
    main(sys.argv[1:])
