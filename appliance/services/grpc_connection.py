"""The connections to one gRPC server: how many there are, and when one counts as dead.

gRPC connects by itself, and again after a connection has ended. What it does not notice by itself
is a peer that has vanished without a word (a cut cable, a host that was switched off): then nothing
arrives, and what is sent is only buffered. So a connection on which nothing has arrived for
`_SILENCE_MS` is pinged, and given up if that is not answered within `_PING_MS`, which together is
less than a request may take (`retry.BUDGET_S`). The calls on it fail and are repeated on a new one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import grpc

from appliance.errors import ConfigError
from appliance.services.addresses import GrpcAddress
from appliance.services.grpc_messages import CHANNEL_OPTIONS

C = TypeVar("C", bound=grpc.aio.Call)

_SILENCE_MS: Final = 9000
_PING_MS: Final = 7000
# A server that comes back is found within this time, and an attempt to connect takes no longer; by
# default gRPC backs off to two minutes.
_RECONNECT_MAX_MS: Final = 2000
_OPTIONS: Final = (
    *CHANNEL_OPTIONS,
    # Without this, all channels to one server share a connection.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", _RECONNECT_MAX_MS),
    ("grpc.max_reconnect_backoff_ms", _RECONNECT_MAX_MS),
    # Only while there are calls: an idle connection costs nothing.
    ("grpc.keepalive_time_ms", _SILENCE_MS),
    ("grpc.keepalive_timeout_ms", _PING_MS),
    # Which of the two counts depends on the release of gRPC.
    ("grpc.http2.ping_timeout_ms", _PING_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
# By default gRPC makes an `:authority` from the path of the socket, and strict servers reset the
# stream for it.
_UNIX_OPTIONS: Final = (*_OPTIONS, ("grpc.default_authority", "localhost"))
# A lost packet holds up all calls on its connection, and a connection that has just lost one is
# slow, so calls are spread over a few once there are several at a time. More are opened only when
# each has as many calls as servers allow on one, mostly 100: calls that only wait must not block
# others.
_CALLS_BEFORE_SPREADING: Final = 4
_SPREAD_OVER: Final = 4
_CALLS_OF_CONNECTION: Final = 100
_CONNECTIONS_MAX: Final = 16


class _Connection:
    """A channel, and the number of calls on it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.num_calls = 0

    def begin(self, start: Callable[[grpc.aio.Channel], C]) -> C:
        """Begin a call; it counts until it is done."""
        call = start(self.channel)
        self.num_calls += 1
        call.add_done_callback(self._end)
        return call

    def _end(self, _call: object) -> None:
        self.num_calls -= 1


class Connections:
    """The connections to the server at `address`; used on one event loop.

    Raises:
        ConfigError: a certificate or key that the address names cannot be read.
    """

    def __init__(self, address: GrpcAddress) -> None:
        self._address = address
        self._credentials = _credentials(address) if address.is_tls else None
        self._connections: list[_Connection] = []

    def begin(self, start: Callable[[grpc.aio.Channel], C]) -> C:
        """Begin a call on the connection with the fewest; `start` makes it of a channel."""
        return self._choose().begin(start)

    async def close(self) -> None:
        """Cancel all calls and disconnect."""
        for connection in self._connections:
            await connection.channel.close()

    def _choose(self) -> _Connection:
        number = len(self._connections)
        if number:
            least = min(self._connections, key=lambda connection: connection.num_calls)
            most = _CALLS_BEFORE_SPREADING if number < _SPREAD_OVER else _CALLS_OF_CONNECTION
            if least.num_calls < most or number == _CONNECTIONS_MAX:
                return least
        self._connections.append(_Connection(self._connect()))
        return self._connections[-1]

    def _connect(self) -> grpc.aio.Channel:
        target = self._address.target
        if self._credentials is not None:
            return grpc.aio.secure_channel(target, self._credentials, options=_OPTIONS)
        options = _UNIX_OPTIONS if self._address.is_unix() else _OPTIONS
        return grpc.aio.insecure_channel(target, options=options)


def _credentials(address: GrpcAddress) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        root_certificates=_file(address.ca_cert, "tls-ca-cert-path"),
        private_key=_file(address.client_key, "tls-client-key-path"),
        certificate_chain=_file(address.client_cert, "tls-client-cert-path"),
    )


def _file(path: Path | None, parameter: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(f"{parameter} {path}: {exc.strerror}") from exc
