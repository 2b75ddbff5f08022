"""Addresses of services: which are valid, and which rule the others break."""

from pathlib import Path

import pytest

from appliance.cli.options import default_state_dir
from appliance.errors import ConfigError
from appliance.services.addresses import (
    GrpcAddress,
    LmdbAddress,
    MemoryAddress,
    ObjectScheme,
    ObjectStoreAddress,
    ServiceAddress,
    ServiceAddresses,
    parse_service_uri,
)


@pytest.mark.parametrize(
    ("uri", "address"),
    [
        ("memory:", MemoryAddress()),
        ("memory://", MemoryAddress()),
        ("lmdb:///srv/store", LmdbAddress(Path("/srv/store"))),
        ("lmdb:///with%20space", LmdbAddress(Path("/with space"))),
        (
            "grpc+unix:///path/to/somewhere",
            GrpcAddress("unix:/path/to/somewhere", is_tls=False),
        ),
        ("grpc+unix:/run/store.sock", GrpcAddress("unix:/run/store.sock", is_tls=False)),
        ("grpc+unix:/with%20space", GrpcAddress("unix:/with%20space", is_tls=False)),
        ("lmdb:/srv/store", LmdbAddress(Path("/srv/store"))),
        ("grpc+unix:///run/store.sock", GrpcAddress("unix:/run/store.sock", is_tls=False)),
        ("grpc+http://localhost", GrpcAddress("dns:///localhost:80", is_tls=False)),
        ("grpc+http://localhost:8000", GrpcAddress("dns:///localhost:8000", is_tls=False)),
        ("grpc+http://[::1]:8000", GrpcAddress("dns:///[::1]:8000", is_tls=False)),
        ("grpc+http://[::1]:12345", GrpcAddress("dns:///[::1]:12345", is_tls=False)),
        ("grpc+https://localhost", GrpcAddress("dns:///localhost:443", is_tls=True)),
        ("grpc+https://host", GrpcAddress("dns:///host:443", is_tls=True)),
        ("grpc+unix:/a?wait-connect=1", GrpcAddress("unix:/a", is_tls=False, waits=True)),
        ("grpc+http://a:1?wait-connect=0", GrpcAddress("dns:///a:1", is_tls=False)),
        (
            "grpc+https://a?tls-ca-cert-path=/etc/a%20b&wait-connect=1",
            GrpcAddress("dns:///a:443", is_tls=True, waits=True, ca_cert=Path("/etc/a b")),
        ),
        (
            "grpc+https://a?tls-client-cert-path=/c&tls-client-key-path=k",
            GrpcAddress("dns:///a:443", is_tls=True, client_cert=Path("/c"), client_key=Path("k")),
        ),
        ("objectstore+memory:", ObjectStoreAddress(ObjectScheme.MEMORY)),
        ("objectstore+memory://", ObjectStoreAddress(ObjectScheme.MEMORY)),
        ("objectstore+file:///a%20b", ObjectStoreAddress(ObjectScheme.FILE, "", "/a b")),
        ("objectstore+s3://b", ObjectStoreAddress(ObjectScheme.S3, "b")),
        (
            "objectstore+s3://b/p/q/?region=eu&AWS_ENDPOINT=http://h:1/%26",
            ObjectStoreAddress(
                ObjectScheme.S3, "b", "p/q", (("region", "eu"), ("aws_endpoint", "http://h:1/&"))
            ),
        ),
        ("objectstore+gs://b/p", ObjectStoreAddress(ObjectScheme.GS, "b", "p")),
        ("objectstore+az://c", ObjectStoreAddress(ObjectScheme.AZ, "c")),
        ("objectstore+https://h:8/p", ObjectStoreAddress(ObjectScheme.HTTPS, "h:8", "p")),
    ],
)
def test_valid_address_is_understood(uri: str, address: ServiceAddress) -> None:
    assert parse_service_uri(uri) == address


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("", "unknown scheme"),
        ("/srv/store", "unknown scheme"),
        ("sled:///srv/store", "unknown scheme 'sled'"),
        ("http://localhost:8000", "unknown scheme 'http'"),
        ("http://foo.example/test", "unknown scheme 'http'"),
        ("memory:///", "no path"),
        ("memory://foo", "no host"),
        ("memory:///foo", "no path"),
        ("memory://foo/bar", "no host"),
        ("lmdb:", "must be absolute"),
        ("lmdb://", "must be absolute"),
        ("lmdb:///", "must not be /"),
        ("lmdb://foo.example", "three slashes"),
        ("lmdb://foo.example/tmp/bar", "three slashes"),
        ("lmdb://foo", "three slashes"),
        ("lmdb://foo/bar", "three slashes"),
        ("lmdb:relative", "must be absolute"),
        ("lmdb:///a%00b", "NUL"),
        ("lmdb:///a?sync=no", "no query"),
        ("lmdb:///a#b", "no fragment"),
        ("grpc+unix:/a#b", "no fragment"),
        ("memory:?wait-connect=1", "no query"),
        ("grpc+unix:/a?wait=1", "unknown parameter 'wait'; known: wait-connect"),
        ("grpc+unix:/a?wait-connect", "wait-connect has no value"),
        ("grpc+unix:/a?wait-connect=yes", "wait-connect is yes, expected 0 or 1"),
        ("grpc+unix:/a?wait-connect=1&wait-connect=1", "wait-connect is given twice"),
        ("grpc+http://a?tls-ca-cert-path=/c", "tls-ca-cert-path is for grpc+https only"),
        ("grpc+https://a?tls-client-key-path=/c", "need each other"),
        ("grpc+https://a?ca=/c", "unknown parameter 'ca'; known: wait-connect, tls-ca-cert-path, "),
        ("grpc+unix://", "must be absolute"),
        ("grpc+unix:///", "must not be /"),
        ("grpc+unix://host/path", "three slashes"),
        ("grpc+unix://host.example/path/to/somewhere", "three slashes"),
        ("grpc+http://", "the host is missing"),
        ("grpc+http://:8000", "the host is missing"),
        ("grpc+http:///path", "no path"),
        ("grpc+http://localhost/", "not even a trailing slash"),
        ("grpc+http://localhost/path", "no path"),
        ("grpc+http://localhost/some-path", "no path"),
        ("grpc+https://localhost/some-path", "no path"),
        ("grpc+https://localhost:8000/", "not even a trailing slash"),
        ("grpc+http://localhost:99999", "Port out of range"),
        ("grpc+http://localhost:http", "Port could not be cast"),
        ("grpc+http://user@localhost", "no user name"),
        ("grpc+http://[::1", "Invalid IPv6 URL"),
        ("objectstore+ftp://a", "known are file, memory, http, https, s3, gs, az"),
        ("objectstore+s3:", "the bucket is missing"),
        ("objectstore+s3:///p", "the bucket is missing"),
        ("objectstore+https:///p", "the host is missing"),
        ("objectstore+s3://u:p@b", "no user name"),
        ("objectstore+s3://b?region=a&REGION=b", "REGION is given twice"),
        ("objectstore+s3://b/p//q", "an empty part"),
        ("objectstore+s3://b/../q", "or one that is . or .."),
        ("objectstore+s3://b#c", "no fragment"),
        ("objectstore+file:///a?x=y", "takes no query"),
        ("objectstore+file://host/a", "three slashes"),
        ("objectstore+memory:///x", "no path"),
    ],
)
def test_invalid_address_is_refused_by_its_rule(uri: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_service_uri(uri)

    assert str(caught.value).startswith(f"service address {uri}: ")
    assert rule in str(caught.value)


def addresses(*uris: str) -> ServiceAddresses:
    return ServiceAddresses(*(parse_service_uri(uri) for uri in uris))


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("memory://", "memory:"),
        ("lmdb:/srv//./store/", "lmdb:///srv/store"),
        ("lmdb:///srv/../etc/with%20space%ff", "lmdb:///etc/with%20space%FF"),
        ("grpc+unix:/no/such.sock", "grpc+unix:///no/such.sock"),
        ("grpc+unix:///no/%73uch.sock", "grpc+unix:///no/such.sock"),
        ("grpc+http://Store.Example", "grpc+http://store.example:80"),
        ("grpc+http://store.example:80", "grpc+http://store.example:80"),
        ("grpc+https://Store.Example", "grpc+https://store.example:443"),
        ("grpc+https://store.example:8443", "grpc+https://store.example:8443"),
        ("grpc+http://[::AB]:8000", "grpc+http://[::ab]:8000"),
        ("grpc+https://a?tls-ca-cert-path=/c&wait-connect=1", "grpc+https://a:443"),
        ("objectstore+memory://", "objectstore+memory:"),
        ("objectstore+file:///srv/../etc/%20", "objectstore+file:///etc/%20"),
        ("objectstore+s3://b/p%20q/?secret_access_key=x&region=y", "objectstore+s3://b/p%20q"),
        (
            "objectstore+s3://b?aws_endpoint_url=http://h:1",
            "objectstore+s3://b?endpoint=http%3A%2F%2Fh%3A1",
        ),
        (
            "objectstore+az://c/p?azure_storage_account_name=me",
            "objectstore+az://c/p?account_name=me",
        ),
    ],
)
def test_address_has_one_canonical_text(uri: str, text: str) -> None:
    address = parse_service_uri(uri)
    assert address.canonical() == text
    assert parse_service_uri(text).canonical() == text


def test_canonical_text_follows_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for scheme in ("lmdb", "grpc+unix"):
        texts = {
            parse_service_uri(f"{scheme}:{tmp_path}/{name}/x").canonical()
            for name in ("real", "link")
        }
        assert texts == {f"{scheme}://{tmp_path}/real/x"}


# Literal, as caches of installed releases are found by them: a change here orphans those.
CANONICAL = """\
blobs=grpc+https://store.example:443
directories=grpc+unix:///no/such.sock
path-infos=lmdb:///no/store
"""
STATE_DIRECTORY = "remote-13eb5c9c103d4c09.state"


def test_canonical_text_of_services_and_their_state_directory_never_change() -> None:
    services = addresses("grpc+https://Store.example", "grpc+unix:/no/such.sock", "lmdb:/no/store")
    assert services.canonical() == CANONICAL
    state_home = {"XDG_STATE_HOME": "/no/home"}
    assert default_state_dir(services, state_home).name == STATE_DIRECTORY


def test_services_in_another_order_are_others() -> None:
    one, other = "grpc+http://one", "grpc+http://other"
    texts = {addresses(*uris).canonical() for uris in [(one, other, one), (other, one, one)]}
    assert len(texts) == 2
