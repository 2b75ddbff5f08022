"""What may be in a view, and the files that it may have besides its store paths.

A view is complete: whatever a path in it refers to is in it, too. A guest that sees only the view
finds everything that its programs need, and can register it with its own Nix.
"""

from collections.abc import Iterable, Sequence

from appliance.errors import StoreError
from appliance.nix.store_path import StorePath
from appliance.services.contracts import Services
from appliance.services.registration import Registered, registered
from appliance.store.views import REGISTRATION, STORE_PATHS, View, ViewFile


async def closure_view(services: Services, paths: Iterable[StorePath], *, has_files: bool) -> View:
    """Return the view of `paths` and whatever they refer to, directly or not.

    Args:
        services: where the paths are; they are written to if `has_files`.
        paths: any number of store paths.
        has_files: whether the view has files besides its paths; their blobs are put here.

    Raises:
        StoreError: some of the paths are not in the store: one line for each.
        PathInfoError: the store does not know what a path refers to.
    """
    return await _view(services, await registered(services, paths, is_recursive=True), has_files)


async def exact_view(services: Services, paths: Iterable[StorePath], *, has_files: bool) -> View:
    """Return the view of exactly these paths; the arguments are those of `closure_view`.

    Raises:
        StoreError: some of the paths are not in the store, or refer to others that are not among
            `paths`: one line for each.
        PathInfoError: the store does not know what a path refers to.
    """
    found = await registered(services, paths, is_recursive=False)
    present = {one.path for one in found}
    lacking = [
        f"path {one.path.absolute()} refers to {reference.absolute()}, which is not in the view"
        for one in found
        for reference in one.narinfo.references
        if reference not in present
    ]
    if lacking:
        raise StoreError("\n".join(lacking))
    return await _view(services, found, has_files)


async def _view(services: Services, found: Sequence[Registered], has_files: bool) -> View:  # noqa: FBT001 - private
    paths = frozenset(one.path for one in found)
    if not has_files:
        return View(paths)
    registration = [line for one in found for line in one.lines()]
    store_paths = [one.path.absolute() for one in found]
    files = [
        await _put(services, REGISTRATION, registration),
        await _put(services, STORE_PATHS, store_paths),
    ]
    return View(paths, tuple(files))


async def _put(services: Services, name: str, lines: Iterable[str]) -> ViewFile:
    content = "".join(f"{line}\n" for line in lines).encode()
    writer = await services.blobs.open_write()
    try:
        await writer.write(content)
        digest = await writer.close()
    except BaseException:
        await writer.abort()
        raise
    return ViewFile(name, digest, len(content))
