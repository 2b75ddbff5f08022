"""Requests as a client of any kind sends them."""

import hashlib
import http.client
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from zstandard import ZstdDecompressor

from appliance.nix.narinfo import NarInfoFile, parse_narinfo
from appliance.nix.signing import PublicKey
from tests.http_cache.conftest import Served

pytestmark = pytest.mark.slow


def narinfo_of(served: Served) -> NarInfoFile:
    return parse_narinfo(served.server.ask(f"/{served.digest}.narinfo").body.decode())


def nar_of(served: Served) -> bytes:
    dump = ["nix-store", "--dump", str(served.tree)]
    return subprocess.run(dump, check=True, stdout=subprocess.PIPE).stdout


def test_cache_info(served: Served) -> None:
    reply = served.server.ask("/nix-cache-info")

    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("text/x-nix-cache-info")
    assert reply.body == b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 39\n"


def test_narinfo_is_signed_and_leads_to_the_nar(served: Served, keys: Path) -> None:
    narinfo = narinfo_of(served)
    nar = nar_of(served)
    reply = served.server.ask(f"/{narinfo.url}")

    assert narinfo.path.absolute() == served.path
    assert (reply.status, reply.body) == (200, nar)
    assert reply.headers["Content-Length"] == str(len(nar)) == str(narinfo.file_size)
    assert narinfo.nar_hash.digest == hashlib.sha256(nar).digest()
    key = PublicKey.parse((keys / "public").read_text().strip())
    assert key.verifies(narinfo.signatures[-1], narinfo.fingerprint())


def test_head_says_what_get_would(served: Served) -> None:
    for path in (f"/{served.digest}.narinfo", f"/{narinfo_of(served).url}", "/nix-cache-info"):
        got = served.server.ask(path)
        head = served.server.ask(path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == str(len(got.body))
        assert head.headers["Content-Type"] == got.headers["Content-Type"]


def test_ranges_are_parts_of_the_nar(served: Served) -> None:
    url = f"/{narinfo_of(served).url}"
    nar = nar_of(served)
    size = len(nar)
    for text, start, end in [
        ("0-0", 0, 1),
        ("0-99", 0, 100),
        (f"1000000-{size * 2}", 1_000_000, size),
        (f"{size - 8}-", size - 8, size),
        ("-1000", size - 1000, size),
        (f"-{size * 2}", 0, size),
    ]:
        reply = served.server.ask(url, headers={"Range": f"bytes={text}"})
        assert (reply.status, reply.body) == (206, nar[start:end]), text
        assert reply.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        assert reply.headers["Content-Length"] == str(end - start)


def test_ranges_that_do_not_exist(served: Served) -> None:
    url = f"/{narinfo_of(served).url}"
    nar = nar_of(served)
    reply = served.server.ask(url, headers={"Range": f"bytes={len(nar)}-"})
    assert (reply.status, reply.headers["Content-Range"]) == (416, f"bytes */{len(nar)}")
    assert served.server.ask(url, headers={"Range": "bytes=-0"}).status == 416
    # What is not understood is ignored, as is more than one range.
    for text in ("bytes=", "bytes=-", "bytes=5-1", "bytes=x-y", "lines=0-1", "bytes=0-1,4-5"):
        reply = served.server.ask(url, headers={"Range": text})
        assert (reply.status, reply.body) == (200, nar), text


def test_nar_is_compressed_for_those_that_ask(served: Served) -> None:
    url = f"/{narinfo_of(served).url}"
    nar = nar_of(served)
    for accepted in ("zstd", "gzip, zstd;q=0.5", "br, ZSTD"):
        reply = served.server.ask(url, headers={"Accept-Encoding": accepted})
        assert reply.headers["Content-Encoding"] == "zstd"
        assert ZstdDecompressor().decompressobj().decompress(reply.body) == nar
        assert len(reply.body) < len(nar) / 10
    for accepted in ("gzip", "zstd;q=0", "zstd;q=0.0", "identity"):
        reply = served.server.ask(url, headers={"Accept-Encoding": accepted})
        assert "Content-Encoding" not in reply.headers
        assert reply.body == nar
    reply = served.server.ask(url, headers={"Accept-Encoding": "zstd", "Range": "bytes=0-9"})
    assert reply.body == nar[:10]


def test_nar_that_the_client_has_is_not_sent(served: Served) -> None:
    url = f"/{narinfo_of(served).url}"
    etag = served.server.ask(url, method="HEAD").headers["ETag"]
    assert served.server.ask(url, headers={"If-None-Match": etag}).status == 304
    assert served.server.ask(url, headers={"If-None-Match": '"x"'}).status == 200
    for value, status in ((etag, 206), ('"x"', 200)):
        reply = served.server.ask(url, headers={"Range": "bytes=0-1", "If-Range": value})
        assert reply.status == status


def test_listing_says_where_contents_are(served: Served) -> None:
    reply = served.server.ask(f"/{served.digest}.ls")
    nar = nar_of(served)
    listing = json.loads(reply.body)

    assert reply.headers["Content-Type"] == "application/json"
    assert listing["version"] == 1
    entries = listing["root"]["entries"]
    assert list(entries) == ["bin", "empty", "large", "link", "nothing"]
    assert entries["empty"] == {"type": "directory", "entries": {}}
    assert entries["link"] == {"type": "symlink", "target": "bin/run"}
    run = entries["bin"]["entries"]["run"]
    assert (run["type"], run["size"], run["executable"]) == ("regular", 10, True)
    assert nar[run["narOffset"] :][:10] == b"#!/bin/sh\n"
    large = entries["large"]
    content = (served.tree / "large").read_bytes()
    assert nar[large["narOffset"] : large["narOffset"] + large["size"]] == content
    assert entries["nothing"]["size"] == 0


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/", 200),
        ("/health", 200),
        ("/0123456789abcdfghijklmnpqrsvwxyz.narinfo", 404),
        ("/0123456789abcdfghijklmnpqrsvwxyz.ls", 404),
        ("/0123.narinfo", 404),
        ("/eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee.narinfo", 404),
        ("/nowhere", 404),
        ("/../etc/passwd", 404),
        ("/nar/../../etc/passwd", 404),
        ("/%2e%2e/%2e%2e/etc/passwd", 404),
        ("/nar/0000000000000000000000000000000000000000000000000000.nar", 404),
        ("/nar/snix-castore/", 404),
        ("/nar/snix-castore/%00", 400),
        ("/nar/snix-castore/zz", 400),
        ("/nar/snix-castore/" + "A" * 7000, 400),
        # A directory that is not there, and a file.
        ("/nar/snix-castore/CiQSIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAGAA?narsize=96", 404),
        ("/nar/snix-castore/EiQSIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAGAE?narsize=120", 404),
    ],
)
def test_paths(served: Served, path: str, status: int) -> None:
    reply = served.server.ask(path)
    assert reply.status == status, reply.body


def test_size_in_the_url_must_be_right(served: Served) -> None:
    url, _, size = narinfo_of(served).url.partition("?narsize=")
    assert served.server.ask(f"/{url}").status == 200
    reply = served.server.ask(f"/{url}?narsize={int(size) + 1}")
    assert reply.status == 404
    assert reply.body == f"narsize is {int(size) + 1}, but the NAR has {size}\n".encode()


@pytest.mark.parametrize("method", ["POST", "DELETE", "PATCH"])
def test_other_methods_are_refused(served: Served, method: str) -> None:
    assert served.server.ask(f"/{served.digest}.narinfo", method=method).status == 405


def test_uploads_are_refused_where_they_are_not_allowed(served: Served) -> None:
    name = "0" * 52
    for path in (f"/{served.digest}.narinfo", f"/{served.digest}.ls", f"/nar/{name}.nar"):
        reply = served.server.ask(path, method="PUT", body=b"x")
        assert (reply.status, reply.body) == (403, b"uploads are not allowed here\n")


def test_one_connection_for_everything(served: Served) -> None:
    url = f"/{narinfo_of(served).url}"
    nar = nar_of(served)
    connection = http.client.HTTPConnection("127.0.0.1", served.server.port, timeout=30)
    with closing(connection):
        for _ in range(3):
            for headers, expected in (
                ({}, nar),
                ({"Range": "bytes=100-1999999"}, nar[100:2_000_000]),
                ({"Range": "bytes=0-9"}, nar[:10]),
            ):
                connection.request("GET", url, headers=headers)
                assert connection.getresponse().read() == expected
            connection.request("GET", url, headers={"Accept-Encoding": "zstd"})
            assert ZstdDecompressor().decompressobj().decompress(connection.getresponse().read())
            connection.request("GET", f"/{served.digest}.narinfo")
            assert connection.getresponse().read().startswith(b"StorePath")


def test_requests_before_the_answers(served: Served) -> None:
    url = narinfo_of(served).url
    nar = nar_of(served)
    head = f"GET /{url} HTTP/1.1\r\nHost: x\r\n"
    with served.server.connect() as sock:
        sock.sendall(f"{head}\r\n{head}Connection: close\r\n\r\n".encode())
        out = bytearray()
        while data := sock.recv(1 << 20):
            out += data
    assert out.count(nar) == 2
    assert out.count(b"HTTP/1.1 200") == 2


def test_many_at_the_same_time(served: Served) -> None:
    url = f"/{narinfo_of(served).url}"
    nar = nar_of(served)
    before = sent_bytes(served)
    with ThreadPoolExecutor(16) as threads:
        for reply in threads.map(served.server.ask, [url] * 64):
            assert reply.body == nar
    assert sent_bytes(served) - before == 64 * len(nar)


def sent_bytes(served: Served) -> int:
    (line,) = [
        line
        for line in served.server.ask("/metrics").body.decode().splitlines()
        if line.startswith("appliance_http_sent_bytes_total ")
    ]
    return int(float(line.split()[1]))
