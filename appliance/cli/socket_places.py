"""Where `appliance virtiofs` listens: sockets of the command line, or of the configuration file."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from appliance.cli.exported_options import exported
from appliance.config.settings import TableRow
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from appliance.resolve.exports import Exported
    from appliance.supervisor.listeners import SocketTerms
    from appliance.supervisor.profiling import Profiling
    from appliance.system.bound_socket import BoundSocket
    from appliance.vhost.fs_device import DeviceProperties

# What may follow the path of --socket-path.
_SOCKET_OPTIONS: Final = frozenset({"view", "root", "profile", "record-profile"})


class SocketPlace(NamedTuple):
    """A socket to listen on.

    Args:
        path: where it is.
        gid: the group of its file; None leaves it to the kernel.
        mode: the permissions of its file.
        label: what errors about it begin with.
        given: what differs from other sockets, by the keys that a file has.
    """

    path: Path
    gid: int | None
    mode: int
    label: str
    given: Mapping[str, Any]

    def bind(self) -> "BoundSocket":
        """Listen; the caller owns the socket.

        Raises:
            ConfigError: that is not possible.
        """
        from appliance.system.bound_socket import BoundSocket

        return BoundSocket(self.path, self.gid, mode=self.mode)

    def exported(self, default: "Exported") -> "Exported":
        """Return what those see that connect there; `default` if nothing is said of that.

        Raises:
            ConfigError: see `exported_options.exported`.
        """
        view, root = self.given.get("view"), self.given.get("root")
        if view is None and root is None:
            return default
        return exported(f"{self.label}: ", view, root)

    def profiling(self, default: "Profiling") -> "Profiling":
        """Return which profiles sessions have there; as elsewhere where nothing is said of one.

        Raises:
            ConfigError: no profile may have such a name.
        """
        from appliance.store.profiles import check_profile_name

        given = {key: self.given.get(key) for key in ("profile", "record-profile")}
        for key, name in given.items():
            if name is not None:
                try:
                    check_profile_name(name)
                except ConfigError as exc:
                    raise ConfigError(f"{self.label}: {key}: {exc}") from exc
        play, record = given.values()
        return default._replace(
            play=default.play if play is None else play,
            record=default.record if record is None else record,
        )

    def terms(self, default: "DeviceProperties") -> "SocketTerms | None":
        """Return what device is offered there, and to how many; None if it is as elsewhere."""
        from appliance.supervisor.listeners import SocketTerms
        from appliance.vhost.fs_device import DeviceProperties, encode_tag

        given = self.given
        if not given.keys() & {"tag", "num-request-queues", "queue-size", "max-front-ends"}:
            return None
        properties = DeviceProperties(
            num_queues=1 + given.get("num-request-queues", default.num_queues - 1),
            max_queue_size=given.get("queue-size", default.max_queue_size),
            tag=encode_tag(given["tag"]) if "tag" in given else default.tag,
        )
        return SocketTerms(properties, given.get("max-front-ends"))


def socket_places(options: argparse.Namespace) -> list[SocketPlace]:
    """Return the sockets to listen on, besides an inherited one.

    Raises:
        ConfigError: what is said of one breaks a rule.
    """
    places = []
    if options.socket is not None:
        places.append(_place(options, Path(options.socket), "SOCKET", {}))
    for text in options.socket_path:
        path, given = split_place(text)
        places.append(_place(options, path, f"--socket-path {text}", given))
    return places + [_configured(options, row) for row in options.sockets]


def _configured(options: argparse.Namespace, row: TableRow) -> SocketPlace:
    label = f"{options.config_file.path}:{row.line}: virtiofs.sockets"
    path = row.values.get("path")
    if path is None:
        directory: Path | None = options.listen_dir
        if directory is None:
            raise ConfigError(f"{label}: path is missing, as there is no listen-dir")
        try:
            directory.mkdir(mode=0o755, exist_ok=True)
        except OSError as exc:
            raise ConfigError(f"{label}: {directory}: {exc.strerror}") from exc
        path = directory / f"{row.values['name']}.sock"
    return _place(options, path, label, row.values)


def _place(
    options: argparse.Namespace, path: Path, label: str, given: Mapping[str, Any]
) -> SocketPlace:
    gid = given.get("group", options.socket_group)
    return SocketPlace(path, gid, given.get("mode", options.socket_mode), label, given)


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
