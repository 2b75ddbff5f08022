"""URLs of NARs, which contain the root node, so that nothing has to be remembered to serve them.

    nar/snix-castore/BASE64?narsize=SIZE    a NAR that is rendered from the store
    nar/HASH.nar[.EXTENSION]                a NAR that is uploaded; HASH is that of the file

BASE64 is the root node without its name, as a Node of castore.proto in the URL-safe base 64 without
padding. The binary caches of Snix have the same URLs, and clients can learn from them what the
castore digest of a path is.
"""

import base64
import re
from typing import Final

from google.protobuf.message import DecodeError

from appliance.castore.directory import Node, node_from_message, node_to_message
from appliance.errors import DirectoryError, InvalidRequestError
from appliance.nix.store_path import BASE32_ALPHABET
from appliance.protos import castore_pb2

NAR_PREFIX: Final = "nar/snix-castore/"
_PREFIXES: Final = frozenset({"nar/snix-castore", "nar/tvix-castore"})

# A node is at most a symlink, with a target of 4,095 bytes.
_ENCODED_MAX: Final = 6_000
_ENCODED: Final = re.compile(r"[A-Za-z0-9_-]+")
_UPLOAD: Final = re.compile(rf"nar/([{BASE32_ALPHABET}]{{52}})\.nar(?:\.([a-z0-9]+))?")
# What Nix calls the compression of a file with such an extension.
COMPRESSIONS: Final = {None: "none", "xz": "xz", "bz2": "bzip2", "zst": "zstd"}


def nar_url(node: Node, size: int) -> str:
    """Return the URL of a NAR of `size` bytes, relative to that of the cache."""
    message = node_to_message(node._replace(name=b""))
    encoded = base64.urlsafe_b64encode(message.SerializeToString(deterministic=True))
    return f"{NAR_PREFIX}{encoded.decode().rstrip('=')}?narsize={size}"


def node_of_url(encoded: str) -> Node:
    """Return the node that the last component of such a URL contains.

    Raises:
        InvalidRequestError: there is none in it.
    """
    if len(encoded) > _ENCODED_MAX or not _ENCODED.fullmatch(encoded):
        raise InvalidRequestError("URL of a NAR: not a node in base 64")
    try:
        data = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
        node = node_from_message(castore_pb2.Node.FromString(data))
    except (ValueError, DecodeError, DirectoryError) as exc:
        raise InvalidRequestError(f"URL of a NAR: not a node: {exc}") from exc
    if node.name:
        raise InvalidRequestError("URL of a NAR: its node has a name")
    return node


def node_in_url(url: str) -> Node | None:
    """Return the node in the URL of a NAR, relative to that of a cache, or None if it has none.

    Caches of Tvix have another prefix.
    """
    prefix, _, last = url.rpartition("/")
    if prefix not in _PREFIXES:
        return None
    try:
        return node_of_url(last.partition("?")[0])
    except InvalidRequestError:
        return None


def parse_upload(url: str) -> tuple[str, str]:
    """Return the hash, in base 32, and the compression of an uploaded NAR.

    Raises:
        InvalidRequestError: `url` is not that of an upload, or the compression is not supported.
    """
    match = _UPLOAD.fullmatch(url)
    if match is None:
        raise InvalidRequestError(f"{url[:100]!r} is not nar/HASH.nar, with an extension perhaps")
    extension = match[2]
    if extension not in COMPRESSIONS:
        raise InvalidRequestError(f"NARs with the extension {extension[:20]!r} are not supported")
    return match[1], COMPRESSIONS[extension]
