"""What a daemon demands of PathInfos that are put, and what it adds to them.

The services here stand in front of another PathInfo service and change `put` only. They are stacked
in this order, outermost first:

    SignedPathInfoService      refuses what no trusted key has signed
    CheckedPathInfoService     reads all contents and compares them with the PathInfo
    SigningPathInfoService     adds signatures

A signature covers the NAR, not the castore node, and a content address is a mere claim until the
content has been read. So whoever requires signatures, or signs, checks contents as well.
"""

from collections.abc import AsyncIterator, Sequence

from appliance.castore.directory import Node
from appliance.errors import PathInfoError
from appliance.nix.narinfo import NarInfoFile, narinfo_of
from appliance.nix.path_info import read_path_info
from appliance.nix.signing import SecretKey
from appliance.nix.trusted_keys import TrustedKeys, UntrustedPathError
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import NarInfo, PathInfoService, Services
from appliance.services.path_info_checks import CheckedPathInfoService


class _InFrontOf:
    """Passes everything on."""

    def __init__(self, path_infos: PathInfoService) -> None:
        self._path_infos = path_infos

    async def get(self, path_digest: bytes) -> bytes | None:
        """See `PathInfoService.get`."""
        return await self._path_infos.get(path_digest)

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`."""
        return await self._path_infos.put(path_info, needs_references=needs_references)

    def list(self) -> AsyncIterator[bytes]:
        """See `PathInfoService.list`."""
        return self._path_infos.list()

    async def calculate_nar(self, node: Node) -> NarInfo:
        """See `PathInfoService.calculate_nar`."""
        return await self._path_infos.calculate_nar(node)


class SignedPathInfoService(_InFrontOf):
    """Refuses PathInfos with neither a content address nor a signature by one of `keys`."""

    def __init__(self, path_infos: PathInfoService, keys: TrustedKeys) -> None:
        super().__init__(path_infos)
        self._keys = keys

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`.

        Raises:
            UntrustedPathError: no trusted key has signed it, or it does not state its NAR.
        """
        read_path_info(path_info)
        message = pathinfo_pb2.PathInfo.FromString(path_info)
        try:
            claim = narinfo_of(message)
        except PathInfoError as exc:
            raise UntrustedPathError(f"{exc}, so nobody can have signed it") from exc
        self._keys.check(claim)
        return await super().put(path_info, needs_references=needs_references)


class SigningPathInfoService(_InFrontOf):
    """Adds signatures by `keys` to each PathInfo that states its NAR and its references."""

    def __init__(self, path_infos: PathInfoService, keys: Sequence[SecretKey]) -> None:
        super().__init__(path_infos)
        self._keys = keys

    async def put(self, path_info: bytes, *, needs_references: bool = False) -> bytes:
        """See `PathInfoService.put`."""
        read_path_info(path_info)
        message = pathinfo_pb2.PathInfo.FromString(path_info)
        claim = _complete(message)
        if claim is not None:
            made = [key.sign(claim.fingerprint()) for key in self._keys]
            for signature in made:
                if signature not in claim.signatures:
                    message.narinfo.signatures.add(name=signature.name, data=signature.data)
            path_info = message.SerializeToString(deterministic=True)
        return await super().put(path_info, needs_references=needs_references)


def guarded(
    services: Services,
    *,
    trusted_keys: TrustedKeys | None = None,
    secret_keys: Sequence[SecretKey] = (),
    checks_content: bool = False,
) -> Services:
    """Return services whose PathInfos are put by these rules.

    Args:
        services: take what is accepted.
        trusted_keys: one of them must have signed a path without a content address.
        secret_keys: sign what is put.
        checks_content: read and check all contents, which the other two imply.
    """
    path_infos = services.path_infos
    if secret_keys:
        path_infos = SigningPathInfoService(path_infos, secret_keys)
    if checks_content or trusted_keys is not None or secret_keys:
        path_infos = CheckedPathInfoService(services._replace(path_infos=path_infos))
    if trusted_keys is not None:
        path_infos = SignedPathInfoService(path_infos, trusted_keys)
    return services._replace(path_infos=path_infos)


def _complete(message: pathinfo_pb2.PathInfo) -> NarInfoFile | None:
    try:
        return narinfo_of(message)
    except PathInfoError:
        return None
