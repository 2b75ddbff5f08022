"""Settings of servers: `appliance daemon` and `appliance http`."""

from typing import Final

from appliance.config import checks
from appliance.config.guest_settings import (
    METRICS,
    METRICS_HELP,
    PASSED_METRICS,
    SOCKET_MODE,
)
from appliance.config.kinds import Flag, Group, Integer, Mode, PathName, Several, Text
from appliance.config.settings import Setting

PUBLIC_KEYS: Final = Several(
    one=Text(checks.check_key), written='list of public keys, such as "NAME:BASE64"'
)
_LISTEN: Final = Several(one=Text(checks.check_listen), written="list of addresses")
_LISTEN_HELP: Final = (
    "listen on ADDR: HOST:PORT, the path of a Unix socket, @NAME for an abstract one, or "
    "sd-listen[:NAME] for those that systemd passes"
)
_FILES: Final = Several(one=PathName(), written="list of paths")
_ZSTD_LEVEL_MAX: Final = 19


def _requires_signatures(section: str) -> Setting:
    return Setting(
        section=section,
        name="require-signatures",
        kind=Flag(),
        default=False,
        help="refuse store paths that are neither content-addressed nor signed by a key of "
        "--trusted-public-keys",
    )


def _trusted_keys(section: str) -> Setting:
    return Setting(
        section=section,
        name="trusted-public-keys",
        kind=PUBLIC_KEYS,
        metavar="KEYS",
        default=[],
        help="public keys, NAME:BASE64, separated by spaces",
    )


DAEMON_SETTINGS: Final = (
    Setting(
        section="daemon",
        name="listen-address",
        short="-l",
        kind=_LISTEN,
        metavar="ADDR",
        default=["[::1]:8000"],
        help=_LISTEN_HELP,
    ),
    Setting(
        section="daemon",
        name="listen-mode",
        kind=Mode(),
        metavar="MODE",
        default=SOCKET_MODE,
        help="give the Unix sockets created here these permissions, in octal",
    ),
    Setting(
        section="daemon",
        name="listen-group",
        kind=Group(),
        metavar="GROUP",
        help="give the Unix sockets created here to GROUP (a name or number)",
    ),
    Setting(
        section="daemon",
        name="tls-cert",
        kind=PathName(),
        metavar="FILE",
        help="on TCP, speak TLS with the certificate, or chain of them, in FILE (PEM)",
    ),
    Setting(
        section="daemon",
        name="tls-key",
        kind=PathName(),
        metavar="FILE",
        help="the private key of that certificate (PEM)",
    ),
    Setting(
        section="daemon",
        name="tls-client-ca",
        kind=PathName(),
        metavar="FILE",
        help="serve only clients with a certificate of an authority in FILE (PEM)",
    ),
    Setting(
        section="daemon",
        name="read-only",
        kind=Flag(),
        default=False,
        help="refuse everything that is put",
    ),
    Setting(
        section="daemon",
        name="check-content",
        kind=Flag(),
        default=False,
        help="before a store path becomes visible, read all of its contents and check them "
        "against its PathInfo",
    ),
    Setting(
        section="daemon",
        name="allow-replace",
        kind=Flag(),
        default=False,
        help="let clients replace the contents of a store path, which is refused otherwise",
    ),
    _requires_signatures("daemon"),
    _trusted_keys("daemon"),
    Setting(
        section="daemon",
        name="sign",
        kind=_FILES,
        metavar="FILE",
        default=[],
        help="sign each store path that is put with the secret key in FILE; implies "
        "--check-content, as --require-signatures does",
    ),
    Setting(
        section="daemon",
        name="metrics",
        kind=METRICS,
        metavar="ADDR",
        default_text=f"one that it passes under the name {PASSED_METRICS}, or else none are served",
        help=METRICS_HELP,
    ),
)

HTTP_SETTINGS: Final = (
    Setting(
        section="http",
        name="listen-address",
        short="-l",
        kind=_LISTEN,
        metavar="ADDR",
        default=["[::1]:9000"],
        help=_LISTEN_HELP,
    ),
    Setting(
        section="http",
        name="sign",
        kind=_FILES,
        metavar="FILE",
        default=[],
        help="sign each narinfo with the secret key in FILE",
    ),
    Setting(
        section="http",
        name="priority",
        kind=Integer(),
        metavar="N",
        default=39,
        help="of several caches, Nix asks the one with the lowest N first",
    ),
    Setting(
        section="http",
        name="zstd-level",
        kind=Integer(maximum=_ZSTD_LEVEL_MAX),
        metavar="N",
        default=3,
        help=f"compress NARs at this level, from 1 to {_ZSTD_LEVEL_MAX}, for clients that accept "
        "zstd; 0 for never",
    ),
    Setting(
        section="http",
        name="allow-put",
        kind=Flag(),
        default=False,
        help="accept uploads, as `nix copy --to` sends them, from every client that can connect",
    ),
    _requires_signatures("http"),
    _trusted_keys("http"),
)
