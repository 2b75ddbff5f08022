"""All settings: each is an option of commands, a key of the configuration file, or both.

Commands choose their options from here by name (`cli.setting_options`).
"""

from collections.abc import Iterator
from typing import Final

from appliance.config import checks
from appliance.config.guest_settings import MOUNT_SETTINGS, VIRTIOFS_SETTINGS
from appliance.config.kinds import Address, Choice, Flag, PathName, Size, Text
from appliance.config.server_settings import DAEMON_SETTINGS, HTTP_SETTINGS, PUBLIC_KEYS
from appliance.config.settings import Setting, Substituters, TableArray

# What each section of the file is about; the empty one is the top.
SECTIONS: Final = {
    "": "The store, and what holds for all commands",
    "virtiofs": "appliance virtiofs",
    "mount": "appliance mount",
    "daemon": "appliance daemon",
    "http": "appliance http",
}

_ADDRESS: Final = Address(checks.check_address)


def _service(kind: str) -> Setting:
    return Setting(
        name=f"{kind}-service-addr",
        kind=_ADDRESS,
        metavar="URI",
        variable=f"{kind.replace('-', '_').upper()}_SERVICE_ADDR",
        help=f"address of the {kind} service, in place of that of the store",
    )


_SUBSTITUTER_FIELDS: Final = (
    Setting(
        section="substituters",
        name="uri",
        kind=Text(),
        help="the address of a store, as for `store`, or of a binary cache of Nix: "
        "nix+https://HOST, nix+http://HOST or nix+file:///DIR",
    ),
    Setting(
        section="substituters",
        name="trusted-public-keys",
        kind=PUBLIC_KEYS,
        help="for a binary cache: the keys, NAME:BASE64, one of which must have signed a path",
    ),
)

_TOP: Final = (
    Setting(
        name="store",
        kind=_ADDRESS,
        metavar="URI",
        variable="APPLIANCE_STORE",
        default_text="the directory /var/lib/appliance/store for root, "
        "~/.local/state/appliance/store for others",
        help="use the store at this address",
    ),
    _service("blob"),
    _service("directory"),
    _service("path-info"),
    Setting(
        name="state-dir",
        kind=PathName(),
        metavar="DIR",
        variable="APPLIANCE_STATE_DIR",
        default_text="a directory beside the store",
        help="keep in DIR what is not the store's: the cache of remote blobs, control sockets, and "
        "the views of remote services",
    ),
    Setting(
        name="blob-cache-size",
        kind=Size(minimum=1),
        metavar="SIZE",
        variable="APPLIANCE_BLOB_CACHE_SIZE",
        default=10 << 30,
        help="keep up to SIZE of a remote blob service in the state directory: a number of bytes, "
        "or of KiB, MiB, GiB or TiB with the suffix K, M, G or T",
    ),
    Setting(
        name="min-free",
        kind=Size(),
        metavar="SIZE",
        default_text="never",
        help="collect garbage (`appliance gc --keep-free SIZE`) when less than SIZE is free on the "
        "file system of a local store",
    ),
    Setting(
        name="substituter",
        key="substituters",
        kind=Substituters(
            checks.check_substituter, fields=_SUBSTITUTER_FIELDS, required=("uri",), unique=("uri",)
        ),
        metavar="URI",
        default=[],
        help="copy a store path that is looked up and that the store lacks, with all that it "
        "refers to, from the store at URI, or from a binary cache of Nix: "
        "nix+https://HOST?trusted-public-keys=KEYS (also nix+http, nix+file). Several are asked "
        "in their order",
    ),
    Setting(
        name="keep",
        key="keep-substituted",
        kind=Flag(),
        default=False,
        help="keep what was copied from substituters; otherwise garbage collection may remove it "
        "once nobody uses it",
    ),
    Setting(
        name="view",
        kind=Text(checks.check_view),
        metavar="NAME",
        help="show the store paths of a view (see `appliance view`), which can be listed, and "
        "nothing else",
    ),
    Setting(
        name="root",
        kind=Text(checks.check_root),
        metavar="PATH",
        help="make the store path PATH, a directory, the root directory itself",
    ),
    Setting(
        name="profile",
        kind=Text(checks.check_profile),
        metavar="NAME",
        default_text="the profile that has the name of the view or store path, if there is one",
        help="have what the profile NAME names (see `appliance profile`) fetched ahead, in its "
        "order, from when a session begins",
    ),
    Setting(
        name="record-profile",
        kind=Text(checks.check_profile),
        metavar="NAME",
        help="record what sessions read first, in that order, and make it the profile NAME when "
        "the last of them ends",
    ),
    Setting(
        name="list-root",
        kind=Flag(),
        default=False,
        help="let guests, or users of a mount, list the root directory",
    ),
    Setting(
        name="inodes",
        kind=Choice(words=("place", "content")),
        default="place",
        help="give every name an inode number of its own (`place`), or all equal files the same "
        "(`content`, as Tvix and Snix do; programs then take them for hard links)",
    ),
    Setting(
        name="sandbox",
        kind=Choice(words=("on", "none")),
        default="on",
        help="lock worker processes down before they serve, as far as the kernel and the rights of "
        "this process allow, or not at all",
    ),
    Setting(
        name="log-level",
        kind=Choice(words=("debug", "info", "warning", "error"), is_upper=True),
        metavar="LEVEL",
        variable="APPLIANCE_LOG_LEVEL",
        default="INFO",
        help="log events of this level and above: debug, info, warning or error",
    ),
    Setting(
        name="log-format",
        kind=Choice(words=("plain", "json")),
        variable="APPLIANCE_LOG_FORMAT",
        default="plain",
        help="write each event as a line of text or as a line of JSON",
    ),
)

SETTINGS: Final = (
    *_TOP,
    *VIRTIOFS_SETTINGS,
    *MOUNT_SETTINGS,
    *DAEMON_SETTINGS,
    *HTTP_SETTINGS,
)
_BY_NAME: Final = {(each.section, each.name): each for each in SETTINGS}
BY_KEY: Final = {each.file_key: each for each in SETTINGS}


def setting(name: str, section: str = "") -> Setting:
    """Return the setting of an option; those of a section come before those of the top."""
    return _BY_NAME.get((section, name)) or _BY_NAME["", name]


def all_keys() -> Iterator[str]:
    """Yield all keys that a file may have, those of arrays of tables behind that of the array."""
    for each in SETTINGS:
        yield each.file_key
        if isinstance(each.kind, TableArray):
            yield from (f"{each.file_key}.{field.name}" for field in each.kind.fields)
