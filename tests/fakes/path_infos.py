"""Content addresses as a PathInfo has them."""

from appliance.nix.content_address import ContentAddress
from appliance.protos import pathinfo_pb2


def ca_message(address: ContentAddress) -> pathinfo_pb2.NARInfo.CA:
    kind = f"{address.method.name}_{address.hash.algorithm.upper()}"
    return pathinfo_pb2.NARInfo.CA(
        type=pathinfo_pb2.NARInfo.CA.Hash.Value(kind), digest=address.hash.digest
    )
