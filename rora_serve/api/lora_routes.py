"""vLLM's own two routes for adapters, with its bodies and answers, on our store.

Loading imports a folder under a name; unloading frees memory. What vLLM forgets when it unloads,
a name, stays in the store.
"""

import asyncio
import json
from http import HTTPStatus
from typing import NoReturn

from fastapi import APIRouter, Response
from fastapi.responses import PlainTextResponse

from adapters.errors import AdapterNotFoundError
from adapters.names import LATEST
from rora_serve.api.errors import ErrorResponse, Refusal
from rora_serve.api.front_door import current_tenant
from rora_serve.api.protocol import LoadLoraBody, UnloadLoraBody, VllmErrorBody
from rora_serve.api.routing import OurRoute, answers
from rora_serve.api.uploads import not_allowed
from rora_serve.intake import Intake
from rora_serve.models import ModelDirectory
from rora_serve.residency import Residents

_USER_ERROR = "InvalidUserInput"


class VllmRoute(OurRoute):
    """A route whose errors have vLLM's body."""

    def respond(self, response: ErrorResponse) -> Response:
        """Return an error's answer."""
        phrase = HTTPStatus(response.status).phrase.replace(" ", "").removesuffix("Error")
        kind = response.type if response.type == _USER_ERROR else f"{phrase}Error"
        error = {
            "message": response.message,
            "type": kind,
            "param": response.param,
            "code": response.status,
        }
        body = json.dumps({"error": error})
        return Response(body, response.status, media_type="application/json")


def make_lora_router(directory: ModelDirectory, residents: Residents, intake: Intake) -> APIRouter:
    """Return the routes."""
    router = APIRouter(route_class=VllmRoute, prefix="/v1", tags=["vLLM"])
    vllm = {"body": VllmErrorBody, "refused": VllmErrorBody}

    @router.post(
        "/load_lora_adapter",
        response_class=PlainTextResponse,
        responses=answers(400, 403, 404, 422, 507, **vllm),
    )
    async def load_lora_adapter(body: LoadLoraBody) -> Response:
        """Import a folder below one of the server's import folders under a name, and load it.

        What the name means already is only loaded.
        """
        name = body.lora_name
        _check(body, directory)
        if not current_tenant.get().may_manage(name):
            raise Refusal(not_allowed(name))
        intake.check_name(name, LATEST)
        await _import(body, intake)
        await residents.load(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    @router.post(
        "/unload_lora_adapter",
        response_class=PlainTextResponse,
        responses=answers(400, 404, 409, **vllm),
    )
    async def unload_lora_adapter(body: UnloadLoraBody) -> Response:
        """Free the memory of all versions of a name; its next request loads it again."""
        name = body.lora_name
        if not name:
            _refuse("'lora_name' needs to be provided to unload a LoRA adapter.")
        missing = f"The lora adapter '{name[:100]}' cannot be found."
        if not current_tenant.get().may_manage(name):
            _refuse_missing(missing)
        try:
            record = await asyncio.to_thread(directory.store.record, name)
        except AdapterNotFoundError:
            _refuse_missing(missing)
        await residents.unload(name, record.versions)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    return router


def _check(body: LoadLoraBody, directory: ModelDirectory) -> None:
    name = body.lora_name
    if not name or not body.lora_path:
        _refuse("Both 'lora_name' and 'lora_path' must be provided.")
    if name in directory.base_names:
        _refuse(f"The lora adapter '{name}' conflicts with a served base model.")
    if body.is_3d_lora_weight:
        _refuse("'is_3d_lora_weight' is not served; one pair of factors a module is expected.")


async def _import(body: LoadLoraBody, intake: Intake) -> None:
    """Let the name mean what lies at the path, unless it does already."""
    name = body.lora_name
    folder = await asyncio.to_thread(intake.importable, body.lora_path)
    if folder is None:
        path = body.lora_path[:1000]
        _refuse_missing(f"Loading lora {name} failed: No adapter found for {path}")
    async with intake.receiving() as incoming:
        await asyncio.to_thread(incoming.copy, folder)
        arrival = await intake.examine(incoming.folder, name)
        try:
            latest = await asyncio.to_thread(intake.store.resolve, name)
        except AdapterNotFoundError:
            pass
        else:
            if latest.version.digest == arrival.examined.version.digest:
                return
            if not body.load_inplace:
                _refuse(
                    f"The lora adapter '{name}' has already been loaded. If you want to load the "
                    "adapter in place, set 'load_inplace' to True."
                )
        await intake.accept(arrival, name, LATEST, user=current_tenant.get().name)


def _refuse(message: str) -> NoReturn:
    raise Refusal(ErrorResponse(400, message, "bad_request", _USER_ERROR))


def _refuse_missing(message: str) -> NoReturn:
    raise Refusal(ErrorResponse(404, message, "adapter_not_found"))
