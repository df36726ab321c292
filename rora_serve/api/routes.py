"""All of our own routes together; here are those for the list of models, and for readiness."""

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, Response
from starlette.routing import BaseRoute

from adapters import NameRecord
from adapters.errors import AdapterNotFoundError
from rora_serve.api.adapters import make_adapter_router
from rora_serve.api.errors import Refusal, model_not_found
from rora_serve.api.front_door import current_tenant
from rora_serve.api.lora_routes import make_lora_router
from rora_serve.api.openapi import document_route
from rora_serve.api.protocol import ModelCard, ModelList, RankRange
from rora_serve.api.routing import OurRoute, answers
from rora_serve.api.uploads import make_upload_router
from rora_serve.api.views import Views
from rora_serve.intake import Intake
from rora_serve.models import ModelDirectory
from rora_serve.residency import Residents


def make_routes(
    directory: ModelDirectory,
    residents: Residents,
    intake: Intake,
    views: Views,
    *,
    started: int,
    is_ready: Callable[[], bool],
    max_upload_bytes: int,
) -> list[BaseRoute]:
    """Return every route of ours, and the one of the document that describes them.

    Args:
        started: the server's start in seconds since the epoch.
        is_ready: whether more requests are wanted.
        max_upload_bytes: of a body.
    """
    routers = (
        make_router(directory, started=started, is_ready=is_ready),
        make_adapter_router(residents, views),
        make_upload_router(intake, views, max_upload_bytes=max_upload_bytes),
        make_lora_router(directory, residents, intake),
    )
    return [*(route for router in routers for route in router.routes), document_route()]


def make_router(
    directory: ModelDirectory, *, started: int, is_ready: Callable[[], bool]
) -> APIRouter:
    """Return the routes.

    Args:
        started: the server's start in seconds since the epoch.
        is_ready: whether more requests are wanted.
    """
    router = APIRouter(route_class=OurRoute)

    @router.get(
        "/ready",
        response_class=Response,
        responses={503: {"description": _AWAY}},
        tags=["server"],
    )
    async def ready() -> Response:
        """200 while requests are wanted; else 503."""
        return Response(status_code=200 if is_ready() else 503)

    @router.get("/v1/models", response_model=ModelList, responses=answers(), tags=["models"])
    async def list_models() -> Response:
        """The base model and every adapter name of the store that the caller may use."""
        tenant = current_tenant.get()

        def write() -> str:
            names = directory.base_names if tenant.may_use_base else ()
            cards = [_base_card(name, started) for name in names]
            cards += [
                _adapter_card(record, directory.base_names[0])
                for record in directory.store.names()
                if tenant.may_use(record.name)
            ]
            return ModelList(data=cards).model_dump_json(exclude_none=True)

        # Off the loop, since there may be thousands.
        return Response(await asyncio.to_thread(write), media_type="application/json")

    @router.get(
        "/v1/models/{model:path}",
        response_model_exclude_none=True,
        responses=answers(404),
        tags=["models"],
    )
    async def get_model(model: str) -> ModelCard:
        """One of them, by the name that requests use."""
        tenant = current_tenant.get()
        is_base = model in directory.base_names
        may_use = tenant.may_use_base if is_base else tenant.may_use(model.partition("@")[0])
        if not may_use:
            raise Refusal(model_not_found(model))
        if is_base:
            return _base_card(model, started)
        try:
            resolved = await directory.resolve(model)
        except AdapterNotFoundError as error:
            raise Refusal(model_not_found(model)) from error
        record = NameRecord(model, (resolved.version,), {"latest": resolved.version.digest})
        return _adapter_card(record, directory.base_names[0])

    return router


_AWAY = "Adapters are still being preloaded, the server is stopping, or its engine died."


def _base_card(name: str, started: int) -> ModelCard:
    return ModelCard(id=name, created=started)


def _adapter_card(record: NameRecord, base_name: str) -> ModelCard:
    latest = record.latest
    return ModelCard(
        id=record.name,
        created=latest.added,
        parent=base_name,
        version=f"sha256:{latest.digest}",
        rank=RankRange(min=latest.min_rank, max=latest.max_rank),
    )
