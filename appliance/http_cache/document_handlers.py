"""The handlers of build logs and realisations; see `documents`."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from aiohttp import web

from appliance.errors import InvalidRequestError, PathInfoError
from appliance.http_cache.documents import (
    LOG_CODINGS,
    LOG_MAX,
    REALISATION_MAX,
    Documents,
    StoredLog,
    check_derivation,
    is_signed,
    parse_realisation,
    signed,
)
from appliance.http_cache.http_exchange import body_of, in_thread, send
from appliance.nix.path_info import read_path_info
from appliance.nix.signing import SecretKey
from appliance.nix.store_path import StorePath
from appliance.nix.trusted_keys import TrustedKeys
from appliance.services.contracts import PathInfoService

# Logs that are received at a time; the others wait.
_RECEIVERS: Final = 16
_PIECE_SIZE: Final = 1 << 18


class DocumentHandlers:
    """Answers requests for logs and realisations.

    Args:
        documents: where they are.
        path_infos: what realisations lead to must be there.
        secret_keys: sign realisations when they are sent.
        trusted_keys: one of them must have signed a realisation that is put; None if none need be.
    """

    def __init__(
        self,
        documents: Documents,
        path_infos: PathInfoService,
        *,
        secret_keys: Sequence[SecretKey],
        trusted_keys: TrustedKeys | None,
    ) -> None:
        self._documents = documents
        self._path_infos = path_infos
        self._secret_keys = secret_keys
        self._trusted_keys = trusted_keys
        self._receivers = asyncio.Semaphore(_RECEIVERS)

    async def get_log(self, request: web.Request) -> web.StreamResponse:
        """Send a log."""
        name = request.match_info["name"]
        log = await in_thread(lambda: self._documents.open_log(name))
        if log is None:
            raise web.HTTPNotFound(text="no such log\n")
        with log.file:
            response = web.StreamResponse()
            response.content_type = "text/plain"
            response.content_length = log.size
            if log.coding is not None:
                response.headers["Content-Encoding"] = log.coding
            return await send(request, response, _pieces(log))

    async def put_log(self, request: web.Request) -> web.Response:
        """Receive a log."""
        name = request.match_info["name"]
        check_derivation(name)
        coding = request.headers.get("Content-Encoding", "identity")
        if coding not in {"identity", *LOG_CODINGS}:
            raise web.HTTPUnsupportedMediaType(text="this Content-Encoding is not supported\n")
        async with self._receivers:
            with await in_thread(self._documents.new_file) as file:
                size = 0
                async with aclosing(body_of(request)) as pieces:
                    async for data in pieces:
                        size += len(data)
                        if size > LOG_MAX:
                            raise web.HTTPRequestEntityTooLarge(LOG_MAX, size)
                        await in_thread(lambda: file.write(data))  # noqa: B023 - awaited at once
                kept = None if coding == "identity" else coding
                await in_thread(lambda: self._documents.put_log(name, kept, file))
        return web.Response(status=201, text="")

    async def get_realisation(self, request: web.Request) -> web.Response:
        """Send a realisation."""
        name = request.match_info["name"]
        found = await in_thread(lambda: self._documents.realisation(name))
        if found is None:
            raise web.HTTPNotFound(text="no such realisation\n")
        for key in self._secret_keys:
            found = signed(found, key)
        return web.json_response(found)

    async def put_realisation(self, request: web.Request) -> web.Response:
        """Receive a realisation, whose output path must be in the store."""
        name = request.match_info["name"]
        body = bytearray()
        async with aclosing(body_of(request)) as pieces:
            async for data in pieces:
                body += data
                if len(body) > REALISATION_MAX:
                    raise web.HTTPRequestEntityTooLarge(REALISATION_MAX, len(body))
        realisation = parse_realisation(bytes(body), name)
        if self._trusted_keys is not None and not is_signed(realisation, self._trusted_keys.keys):
            raise InvalidRequestError(f"realisation {name}: no trusted key has signed it")
        output = StorePath.parse(realisation["outPath"])
        encoded = await self._path_infos.get(output.digest)
        if encoded is None or read_path_info(encoded).path != output:
            raise PathInfoError(
                f"realisation {name}: leads to {output.absolute()}, which is missing",
                rule="contradiction",
            )
        await in_thread(lambda: self._documents.put_realisation(realisation))
        return web.Response(status=201, text="")


async def _pieces(log: StoredLog) -> AsyncGenerator[bytes, None]:
    while data := await in_thread(lambda: log.file.read(_PIECE_SIZE)):
        yield data
