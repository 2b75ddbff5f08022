"""What a directory given to `appliance-virtiofsd --shared-dir` stands for.

virtiofsd shares a directory of the host. Here, `/nix/store` is the store, whether there is such a
directory or not; a path in it is that store path, as the root directory. Any other directory says
in a file `appliance.toml` what it stands for: a configuration file, which is used in place of the
one of the host. Where it says nothing of that, guests may list the root directory.

Without the file, the directory would have to be imported first, and a program that is started with
a guest should not take the time for that.
"""

from pathlib import Path
from typing import Final

from appliance.errors import ConfigError
from appliance.nix.store_path import STORE_DIR, StorePath, StorePathError

CONFIG_NAME: Final = "appliance.toml"


def share_words(directory: str | None) -> list[str]:
    """Return the words with which `appliance virtiofs` shares what `directory` stands for.

    Raises:
        ConfigError: it stands for nothing.
    """
    if directory is None:
        raise ConfigError("expected --shared-dir or -o source=")
    # Slashes at the end, and doubled ones, are not a matter of the file system.
    path = Path(directory)
    if path == Path(STORE_DIR):
        return ["--list-root"]
    if path.is_relative_to(STORE_DIR):
        return [f"--root={_root(directory, path.relative_to(STORE_DIR))}"]
    config = path / CONFIG_NAME
    if not config.exists():
        raise ConfigError(_not_imported(directory, path))
    return [f"--config={config}"]


def _root(directory: str, below: Path) -> str:
    name, *rest = below.parts
    try:
        StorePath.parse(name)
    except StorePathError as exc:
        raise ConfigError(f"--shared-dir {directory}: not a store path: {exc}") from exc
    if rest:
        raise ConfigError(f"--shared-dir {directory}: is below a store path; expected a whole one")
    return name


def _not_imported(directory: str, path: Path) -> str:
    if not path.is_dir():
        return f"--shared-dir {directory}: no such directory"
    return (
        f"--shared-dir {directory}: is not in the store; run `appliance import {directory}` first, "
        f"and share the path that it prints (or write a file {CONFIG_NAME} into the directory)"
    )
