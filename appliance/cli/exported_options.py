"""What the root directory of a socket or mount is, and the sockets: the options of `virtiofs`."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.resolve.exports import Exported

# (gid_t)-1, which chown(2) takes as "leave the group alone".
_NO_GROUP: Final = 2**32 - 1
_MODE_MAX: Final = 0o777
_SOCKET_OPTIONS: Final = frozenset({"view", "root", "profile", "record-profile"})


def add_exported_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that say what the root directory is."""
    parser.add_argument(
        "--view",
        metavar="NAME",
        help="show the store paths of a view (see `appliance view`), which can be listed, and "
        "nothing else",
    )
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="make the store path PATH, a directory, the root directory itself",
    )


def exported_of(options: argparse.Namespace) -> "Exported":
    """Return what `options` ask the root directory to be.

    Raises:
        ConfigError: both a view and a store path are given, or the latter is none.
    """
    return exported("", options.view, options.root)


def exported(source: str, view: str | None, root: str | None) -> "Exported":
    """Return what a view or a store path, or neither, asks the root directory to be.

    Args:
        source: begins the text of errors.
        view: the name of a view, or None.
        root: a store path, with or without its directory, or None.

    Raises:
        ConfigError: both are given, no view may have that name, or the path is no store path.
    """
    from appliance.resolve.exports import Exported
    from appliance.services.paths_in_store import parse_path
    from appliance.store.views import check_view_name

    if view is not None and root is not None:
        raise ConfigError(f"{source}--view {view} and --root {root}: only one of them can be given")
    if view is not None:
        return Exported(view=check_view_name(view))
    if root is None:
        return Exported()
    path, names = parse_path(root)
    if names:
        raise ConfigError(f"{source}--root {root}: is below a store path; expected a whole one")
    return Exported(root=path.basename())


def socket_exported(text: str, default: "Exported") -> "Exported":
    """Return what front-ends see that connect to the socket of a value of --socket-path.

    Raises:
        ConfigError: see `split_place` and `exported`.
    """
    _path, given = split_place(text)
    if not {"view", "root"} & given.keys():
        return default
    return exported(f"--socket-path {text}: ", given.get("view"), given.get("root"))


def split_place(text: str) -> tuple[Path, dict[str, str]]:
    """Return the path in the value of --socket-path, and what follows it.

    The path may be followed by `,view=NAME` or `,root=PATH`, and by `,profile=NAME` and
    `,record-profile=NAME`. Two commas stand for one in a path.

    Raises:
        ConfigError: what follows the path is something else.
    """
    parts = [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]
    given: dict[str, str] = {}
    for part in parts[1:]:
        name, equals, value = part.partition("=")
        if name not in _SOCKET_OPTIONS or not equals or name in given:
            raise ConfigError(
                f"--socket-path {text}: {part!r} follows the path, expected view=NAME, root=PATH, "
                "profile=NAME or record-profile=NAME once; a comma in the path is written twice"
            )
        given[name] = value
    if not parts[0]:
        raise ConfigError(f"--socket-path {text}: the path is empty")
    return Path(parts[0]), given


def socket_group(text: str, option: str = "--socket-group") -> int:
    """Return the number of a group, given its name or number as the value of `option`.

    Raises:
        ConfigError: there is no such group.
    """
    import grp

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        if text.isdecimal() and int(text) < _NO_GROUP:
            return int(text)
    raise ConfigError(f"{option} {text}: no such group")


def socket_mode_of(text: str, option: str = "--socket-mode") -> int:
    """Return the permissions of a socket file, given in octal as the value of `option`.

    Raises:
        ConfigError: it is no such number.
    """
    if not re.fullmatch(r"0?[0-7]{1,3}", text) or not 0 < int(text, 8) <= _MODE_MAX:
        raise ConfigError(f"{option} {text}: expected permissions in octal, such as 0660")
    return int(text, 8)
