"""What `appliance attach` has attached: names with sockets, and the file that keeps them.

`STATE_DIR/attached.json` is replaced as a whole and durably with each change, so a supervisor that
starts after a crash serves what was attached:

    {"version": 1, "attached": [{"name": "web1", "socket": "/run/appliance-virtiofs/web1.sock",
                                 "view": "web", "root": null, "gid": 108, "mode": 432,
                                 "profile": null, "record_profile": null}]}
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from appliance.errors import ConfigError, StoreError, disk_error
from appliance.resolve.exports import Exported
from appliance.store.profiles import check_profile_name
from appliance.supervisor.profiling import NO_PROFILING, Profiling

_FILE: Final = "attached.json"
_VERSION: Final = 1
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Attachment(NamedTuple):
    """One name.

    Args:
        name: what the virtual machine is called, for `appliance detach`.
        socket: the absolute path of its socket.
        exported: what its front-ends see.
        gid: the group of the socket file; None leaves it to the kernel.
        mode: the permissions of the socket file.
        profiling: which profiles its sessions have.
    """

    name: str
    socket: Path
    exported: Exported
    gid: int | None
    mode: int
    profiling: Profiling = NO_PROFILING

    def to_json(self) -> dict[str, object]:
        """Return what `from_json` reads."""
        return {
            "name": self.name,
            "socket": str(self.socket),
            "view": self.exported.view,
            "root": self.exported.root,
            "gid": self.gid,
            "mode": self.mode,
            "profile": self.profiling.play,
            "record_profile": self.profiling.record,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """Read what `to_json` has made.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or is something else.
            ConfigError: the name breaks the rule for names.
        """
        name, socket, gid = check_attached_name(row["name"]), Path(row["socket"]), row["gid"]
        view, root = row["view"], row["root"]
        if not all(text is None or isinstance(text, str) for text in (view, root)):
            raise TypeError("view and root are names, or null")
        if view is not None and root is not None:
            raise ValueError("a view or a root, not both")
        if not socket.is_absolute():
            raise ValueError(f"{socket}: is not an absolute path")
        exported = Exported(view=view, root=root)
        # Earlier releases wrote neither.
        given = [row.get("profile"), row.get("record_profile")]
        profiling = Profiling(*(text and check_profile_name(text) for text in given))
        group = None if gid is None else int(gid)
        return cls(name, socket, exported, group, int(row["mode"]), profiling)


class AttachmentFile:
    """The file in the state directory, which the supervisor with the control socket writes."""

    def __init__(self, state_dir: Path) -> None:
        self._path = state_dir / _FILE

    def read(self) -> list[Attachment]:
        """Return what is attached; nothing if there is no file.

        Raises:
            StoreError: the file breaks a rule, or the disk failed.
        """
        try:
            content = json.loads(self._path.read_bytes())
            if content["version"] != _VERSION:
                raise StoreError(f"{self._path}: version {content['version']}, expected {_VERSION}")
            return [Attachment.from_json(row) for row in content["attached"]]
        except FileNotFoundError:
            return []
        except OSError as exc:
            raise disk_error(exc, self._path) from exc
        except (ConfigError, KeyError, TypeError, ValueError) as exc:
            raise StoreError(f"{self._path}: is not what `appliance attach` writes: {exc}") from exc

    def write(self, attached: Iterable[Attachment]) -> None:
        """Replace the file, durably.

        Raises:
            StoreError: the disk failed; the file is as before.
        """
        rows = [attachment.to_json() for attachment in attached]
        new = self._path.with_name(f".{_FILE}.new")
        try:
            with new.open("w") as file:
                json.dump({"version": _VERSION, "attached": rows}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.rename(self._path)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as exc:
            with suppress(OSError):
                new.unlink()
            raise disk_error(exc, self._path) from exc


def check_attached_name(name: str) -> str:
    """Return `name` if a virtual machine may be attached under it.

    Raises:
        ConfigError: it may not.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name {name!r}: expected 1 to 64 letters, digits, dots, dashes and underscores, of "
            "which the first is a letter or digit"
        )
    return name
