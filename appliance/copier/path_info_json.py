"""Lists of store paths in JSON, in the forms that Nix writes.

nix path-info --json      [{"path": ..., ...}] (2.8), {PATH: {...}} (2.34), or in the newest form
                          {"info": {BASENAME: {...}}, ...}
exportReferencesGraph     structured attributes of a derivation: {"exportReferencesGraph":
                          {KEY: [...]}, KEY: [{"path": ..., ...}], ...}

Used are narHash (SHA-256 in any form), narSize, references, deriver, signatures, and ca as text or
as an object with method and hash. Hashes and signatures may be objects as well.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeAlias

from appliance.castore.names import display
from appliance.copier.claims import claim_of
from appliance.errors import PathInfoError
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.signing import Signature
from appliance.nix.store_path import StorePath

Claims: TypeAlias = dict[StorePath, NarInfoFile]

_METHODS: Final = {"nar": Method.NAR, "flat": Method.FLAT, "text": Method.TEXT}


def parse_path_infos(text: str | bytes) -> Claims:
    """Read a list of any form.

    Raises:
        PathInfoError: the form is unknown, or an entry breaks a rule; the text names the path.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise PathInfoError(f"not JSON: {exc}") from exc
    claims: Claims = {}
    for path, info in _entries(document):
        try:
            parsed = _path(path)
            claims[parsed] = _claim(parsed, info)
        except PathInfoError as exc:
            raise PathInfoError(f"{display(path.encode('utf-8', 'replace'))}: {exc}") from exc
    return claims


def _entries(document: object) -> Iterator[tuple[str, object]]:
    match document:
        case list():
            yield from _listed(document)
        case {"exportReferencesGraph": dict(graphs), **attributes}:
            for key in graphs:
                yield from _listed(attributes.get(key))
        case {"info": dict(infos)}:
            yield from infos.items()
        case {"closure": list(graph)}:
            yield from _listed(graph)
        case dict():
            yield from document.items()
        case _:
            raise PathInfoError("neither a list nor an object of store paths")


def _listed(infos: object) -> Iterator[tuple[str, object]]:
    if not isinstance(infos, list):
        raise PathInfoError(
            "exportReferencesGraph names an attribute that is not a list of store paths"
        )
    for info in infos:
        match info:
            case {"path": str(path)}:
                yield path, info
            case _:
                raise PathInfoError(f"{json.dumps(info)[:100]}: the entry has no path")


def _path(text: str) -> StorePath:
    # The newest form has base names.
    return StorePath.parse(text) if "/" not in text else StorePath.parse_absolute(text)


def _claim(path: StorePath, info: object) -> NarInfoFile:
    match info:
        case None | {"valid": False}:
            raise PathInfoError("is not valid in its own store")
        case {"narHash": nar_hash, "narSize": int(nar_size), **more}:
            pass
        case _:
            raise PathInfoError("narHash or narSize is missing")
    deriver = more.get("deriver")
    return claim_of(
        path,
        nar_hash=_hash(nar_hash),
        nar_size=nar_size,
        references=map(_reference, _list(more, "references")),
        deriver=_path(deriver) if isinstance(deriver, str) and deriver else None,
        signatures=map(_signature, _list(more, "signatures")),
        ca=_content_address(more.get("ca")),
    )


def _list(info: Mapping[Any, object], key: str) -> list[object]:
    found = info.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise PathInfoError(f"{key} is not a list")
    return found


def _reference(value: object) -> StorePath:
    if not isinstance(value, str):
        raise PathInfoError(f"reference {value!r} is not a string")
    return _path(value)


def _hash(value: object) -> NixHash:
    match value:
        case str():
            return NixHash.parse(value)
        case {"algorithm": str(algorithm), "hash": str(digest)}:
            # With a colon, the length decides between base 64, 32 and 16.
            return NixHash.parse(f"{algorithm}:{digest}")
        case _:
            raise PathInfoError(f"{value!r} is not a hash")


def _signature(value: object) -> Signature:
    match value:
        case str():
            return Signature.parse(value)
        case {"keyName": str(name), "sig": str(data)}:
            return Signature.parse(f"{name}:{data}")
        case _:
            raise PathInfoError(f"{value!r} is not a signature")


def _content_address(value: object) -> ContentAddress | None:
    match value:
        case None | "":
            return None
        case str():
            return ContentAddress.parse(value)
        case {"method": str(method), "hash": digest} if method in _METHODS:
            return ContentAddress(_METHODS[method], _hash(digest))
        case _:
            raise PathInfoError(f"{value!r} is not a known kind of content address")
