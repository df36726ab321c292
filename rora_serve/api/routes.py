"""Our own HTTP routes: the list of models, and readiness."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from adapters import NameRecord
from adapters.errors import RoraError
from rora_serve.api.errors import to_response
from rora_serve.models import ModelDirectory


def make_router(
    directory: ModelDirectory, *, started: int, is_alive: Callable[[], bool]
) -> APIRouter:
    """Return the routes.

    Args:
        started: the server's start in seconds since the epoch.
        is_alive: whether the engine still runs.
    """
    router = APIRouter()

    @router.get("/ready")
    async def ready() -> Response:
        """200 while the engine runs, with its adapter layers in place; 503 after it died."""
        return Response(status_code=200 if is_alive() else 503)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The base model and every adapter name of the store."""
        records = await asyncio.to_thread(directory.store.names)
        cards = [_base_card(name, started) for name in directory.base_names]
        cards += [_adapter_card(record, directory.base_names[0]) for record in records]
        return {"object": "list", "data": cards}

    @router.get("/v1/models/{model:path}")
    async def get_model(model: str) -> Response:
        """One of them, by the name that requests use."""
        if model in directory.base_names:
            return JSONResponse(_base_card(model, started))
        try:
            resolved = await asyncio.to_thread(directory.store.resolve, model)
        except RoraError as error:
            answer = to_response(error, model)
            return Response(answer.body, answer.status, media_type="application/json")
        record = NameRecord(model, (resolved.version,), {"latest": resolved.version.digest})
        return JSONResponse(_adapter_card(record, directory.base_names[0]))

    return router


def _base_card(name: str, started: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": started, "owned_by": "rora-serve"}


def _adapter_card(record: NameRecord, base_name: str) -> dict[str, Any]:
    latest = record.latest
    return {
        "id": record.name,
        "object": "model",
        "created": latest.added,
        "owned_by": "rora-serve",
        "parent": base_name,
        "version": f"sha256:{latest.digest}",
        "rank": {"min": latest.min_rank, "max": latest.max_rank},
    }
