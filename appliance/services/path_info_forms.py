"""PathInfos as JSON, in the forms of `nix path-info --json`.

list    [{"path": PATH, "narHash": ..., ...}], of Nix up to 2.18 and of Lix: a field that would be
        empty is left out, and a path that is not in the store is {"path": PATH, "valid": false}
1       {PATH: {...}}, of Nix from 2.19 on: every field is there, a missing path is null
2       {"version": 2, "storeDir": ..., "info": {BASENAME: {...}}}, of Nix from 2.33 on: store paths
        are base names, and a content address is an object with `method` and `hash`
"""

from collections.abc import Mapping
from typing import Final, TypeAlias

from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.narinfo import deriver_of
from appliance.nix.signing import Signature
from appliance.nix.store_path import STORE_DIR, StorePath
from appliance.protos import pathinfo_pb2

Fields: TypeAlias = dict[str, object]

FORMATS: Final = ("list", "1", "2")

_METHODS: Final = {Method.NAR: "nar", Method.FLAT: "flat", Method.TEXT: "text"}


def path_infos_json(
    infos: Mapping[StorePath, pathinfo_pb2.PathInfo | None],
    closure_sizes: Mapping[StorePath, int] | None,
    form: str,
) -> object:
    """Return PathInfos as JSON.

    Args:
        infos: the PathInfos, by their paths; None for a path that is not in the store.
        closure_sizes: sizes of their closures in bytes; None to leave them out.
        form: one of `FORMATS`.
    """
    shown: dict[StorePath, Fields | None] = {}
    for path, message in infos.items():
        if message is None:
            shown[path] = None
            continue
        fields = path_info_v2(message) if form == "2" else path_info_v1(message)
        if closure_sizes is not None:
            fields["closureSize"] = closure_sizes[path]
        shown[path] = fields
    if form == "list":
        return [_listed(path, fields) for path, fields in shown.items()]
    if form == "1":
        return {path.absolute(): fields for path, fields in shown.items()}
    return {
        "version": 2,
        "storeDir": STORE_DIR,
        "info": {path.basename(): fields for path, fields in shown.items()},
    }


def path_info_v1(message: pathinfo_pb2.PathInfo) -> Fields:
    """Return a PathInfo in form 1."""
    narinfo = message.narinfo
    deriver = deriver_of(narinfo)
    return {
        "ca": _ca_text(narinfo) if narinfo.HasField("ca") else None,
        "deriver": None if deriver is None else deriver.absolute(),
        "narHash": _nar_hash(narinfo),
        "narSize": narinfo.nar_size,
        "references": [f"{STORE_DIR}/{name}" for name in narinfo.reference_names],
        "signatures": [str(Signature(each.name, each.data)) for each in narinfo.signatures],
    }


def path_info_v2(message: pathinfo_pb2.PathInfo) -> Fields:
    """Return a PathInfo in form 2."""
    narinfo = message.narinfo
    deriver = deriver_of(narinfo)
    address = ContentAddress.of_message(narinfo)
    return {
        **path_info_v1(message),
        "ca": None
        if address is None
        else {"method": _METHODS[address.method], "hash": address.hash.sri()},
        "deriver": None if deriver is None else deriver.basename(),
        "references": list(narinfo.reference_names),
        "storeDir": STORE_DIR,
        "version": 2,
    }


def _listed(path: StorePath, fields: Fields | None) -> Fields:
    if fields is None:
        return {"path": path.absolute(), "valid": False}
    kept = {name: value for name, value in fields.items() if value or name == "references"}
    return {"path": path.absolute(), **kept}


def _nar_hash(narinfo: pathinfo_pb2.NARInfo) -> str | None:
    return NixHash("sha256", narinfo.nar_sha256).sri() if narinfo.nar_sha256 else None


def _ca_text(narinfo: pathinfo_pb2.NARInfo) -> str:
    address = ContentAddress.of_message(narinfo)
    return f"unknown:{narinfo.ca.type}" if address is None else str(address)
