"""Routes that show adapters, move their aliases, load, pin, unload and remove them."""

from typing import Annotated

from fastapi import APIRouter, Body, Path, Query, Request, Response

from adapters import NameRecord
from adapters.names import LATEST, NAME_PATTERN, check_alias
from rora_serve.api.errors import Refusal
from rora_serve.api.protocol import (
    AdapterCard,
    AdapterDetail,
    AdapterList,
    AliasBody,
    Deleted,
    RollbackBody,
)
from rora_serve.api.routing import OurRoute, answers
from rora_serve.api.views import Views, check_manageable, check_visible
from rora_serve.residency import IsWanted, Residents

Name = Annotated[str, Path(description="name of an adapter")]
Alias = Annotated[
    str, Path(description="any name", json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})
]
VersionQuery = Annotated[
    str | None, Query(description="alias or sha256:<at least 12 digits> of a version")
]


def make_adapter_router(residents: Residents, views: Views) -> APIRouter:
    """Return the routes below /v1/adapters, but for the upload."""
    router = APIRouter(route_class=OurRoute, prefix="/v1/adapters", tags=["adapters"])
    _add_reading(router, views)
    _add_aliases(router, residents, views)
    _add_residency(router, residents, views)
    _add_removal(router, residents, views)
    return router


def _add_reading(router: APIRouter, views: Views) -> None:
    @router.get("", response_model=AdapterList, responses=answers())
    async def list_adapters() -> Response:
        """Every adapter that the caller may use or manage, sorted by name."""
        return Response(await views.listing(), media_type="application/json")

    @router.get("/{name}", responses=answers(404))
    async def get_adapter(name: Name, version: VersionQuery = None) -> AdapterDetail:
        """One adapter: versions, aliases and their history; modules and receipt of one version."""
        check_visible(name)
        return await views.detail(name, version)


def _add_aliases(router: APIRouter, residents: Residents, views: Views) -> None:
    @router.put("/{name}/aliases/{alias}", responses=answers(400, 404, 409, 422, 507))
    async def set_alias(name: Name, alias: Alias, body: AliasBody, request: Request) -> AdapterCard:
        """Let an alias mean a version, once that is in memory and can be served.

        Running requests end on the version they began with.
        """
        check_manageable(name)
        check_alias(alias)
        await views.record(name)
        await residents.move(name, body.version, alias, is_wanted=_is_connected(request))
        return await views.card(name)

    @router.post("/{name}/rollback", responses=answers(400, 404, 409, 422, 507))
    async def roll_back(
        name: Name, request: Request, body: Annotated[RollbackBody | None, Body()] = None
    ) -> AdapterCard:
        """Let an alias mean what it meant before, once that is in memory and can be served.

        A second time goes one step further back.
        """
        check_manageable(name)
        alias = LATEST if body is None else body.alias
        (await views.record(name)).find(alias)
        await residents.roll_back(name, alias, is_wanted=_is_connected(request))
        return await views.card(name)


def _add_residency(router: APIRouter, residents: Residents, views: Views) -> None:
    async def record_or_forget(name: str) -> NameRecord:
        try:
            return await views.record(name)
        except Refusal:
            residents.forget(name)
            raise

    @router.post("/{name}/load", responses=answers(404, 422))
    async def load(name: Name, version: VersionQuery = None) -> AdapterCard:
        """Bring a version, else the latest, into memory, as its first request would."""
        check_manageable(name)
        await views.record(name)
        await residents.load(_reference(name, version))
        return await views.card(name)

    @router.post("/{name}/unload", responses=answers(404, 409))
    async def unload(name: Name, version: VersionQuery = None) -> AdapterCard:
        """Free the memory of a version, else of all of the name, once its requests have ended.

        Pins of this name end. Weights that another name uses too stay for it.
        """
        check_manageable(name)
        record = await record_or_forget(name)
        versions = record.versions if version is None else [record.find(version)]
        await residents.unload(name, versions)
        return await views.card(name)

    @router.put("/{name}/pin", responses=answers(404, 409, 422))
    async def pin(name: Name, version: VersionQuery = None) -> AdapterCard:
        """Bring a version, else the latest, into memory and keep it there."""
        check_manageable(name)
        await views.record(name)
        await residents.pin(_reference(name, version))
        return await views.card(name)

    @router.delete("/{name}/pin", responses=answers(404))
    async def unpin(name: Name, version: VersionQuery = None) -> AdapterCard:
        """Let a version, else all of the name, make room for others again."""
        check_manageable(name)
        record = await record_or_forget(name)
        versions = record.versions if version is None else [record.find(version)]
        residents.unpin(name, versions)
        return await views.card(name)


def _add_removal(router: APIRouter, residents: Residents, views: Views) -> None:
    @router.delete("/{name}", responses=answers(400, 404, 409, 507))
    async def remove(
        name: Annotated[
            str, Path(description="of an adapter, or name@sha256:<at least 12 digits>, name@alias")
        ],
        force: Annotated[  # noqa: FBT002  (in the query it has a name)
            bool, Query(description="even if aliases mean it or requests use it")
        ] = False,
    ) -> Deleted:
        """Remove a name, one version of it, or an alias; what they took is freed.

        Running requests end on the version they began with.
        """
        bare_name = name.partition("@")[0]
        check_manageable(bare_name)
        await views.record(bare_name)
        await residents.remove(name, force=force)
        return Deleted(id=name)


def _is_connected(request: Request) -> IsWanted:
    """Return what tells whether the client is still there, to hear what became of it."""

    async def is_connected() -> bool:
        return not await request.is_disconnected()

    return is_connected


def _reference(name: str, version: str | None) -> str:
    return name if version is None else f"{name}@{version}"
