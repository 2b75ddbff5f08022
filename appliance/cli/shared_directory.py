"""What a directory given to `appliance-virtiofsd --shared-dir` stands for.

virtiofsd shares a directory of the host. Here, `/nix/store` is the store, whether there is such a
directory or not; a path in it is that store path, as the root directory. Any other directory says
in a file `appliance.toml` what it stands for:

    store = "lmdb:///srv/store"     # an address as for --store, or the path of a directory
    view = "web"                    # show this view, and nothing else
    state-dir = "state"             # as --state-dir

Relative paths begin at the directory. Without the file, the directory would have to be imported
first, and a program that is started with a guest should not take the time for that.
"""

import tomllib
from pathlib import Path
from typing import Any, Final

from appliance.errors import ConfigError
from appliance.nix.store_path import STORE_DIR, StorePath, StorePathError

CONFIG_NAME: Final = "appliance.toml"


def share_words(directory: str | None) -> list[str]:
    """Return the words with which `appliance virtiofs` shares what `directory` stands for.

    Raises:
        ConfigError: it stands for nothing, or its `appliance.toml` breaks a rule.
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
    try:
        text = config.read_text()
    except FileNotFoundError:
        raise ConfigError(_not_imported(directory, path)) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{config}: {getattr(exc, 'strerror', None) or exc}") from exc
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{config}: {exc}") from exc
    return _words_of(config, values)


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


def _words_of(config: Path, values: dict[str, Any]) -> list[str]:
    words = []
    for key, value in values.items():
        if key == "substituters":
            raise ConfigError(
                f"{config}: substituters: nothing is fetched from binary caches while a guest "
                "waits; copy what it needs with `appliance copy` first"
            )
        if key not in {"store", "view", "state-dir"}:
            raise ConfigError(f"{config}: {key}: unknown; expected store, view or state-dir")
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{config}: {key}: expected a text that is not empty")
        words.append(f"--{key}={_value(config, key, value)}")
    return words if "view" in values else [*words, "--list-root"]


def _value(config: Path, key: str, value: str) -> str:
    if key == "view" or (key == "store" and ":" in value.partition("/")[0]):
        return value
    path = (config.parent / value).absolute()
    return str(path) if key == "state-dir" else f"lmdb://{path}"
