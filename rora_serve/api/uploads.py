"""The route that takes adapters in: as a form, as an archive, or from a folder of the server's."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic import ValidationError

from adapters import ResolvedVersion
from adapters.folder import MAX_FILE_BYTES
from adapters.names import LATEST
from rora_serve.api.errors import (
    ErrorResponse,
    Refusal,
    bad_request,
    bad_values,
    body_too_large,
    body_too_slow,
)
from rora_serve.api.forms import receive_form
from rora_serve.api.front_door import current_tenant
from rora_serve.api.protocol import AdapterDetail, ImportBody
from rora_serve.api.routing import OurRoute, answers
from rora_serve.api.views import Views
from rora_serve.intake import Intake

_FORM = "multipart/form-data"
_JSON = "application/json"
# What an archive is, its first bytes say.
_ARCHIVES = ("application/x-tar", "application/gzip", "application/zip")
_MAX_JSON_BYTES = 64 * 1024
_MAX_DIGITS = 19  # of a length
MAX_SILENT_SECONDS = 60.0  # of whoever sends one
_BINARY = {"type": "string", "format": "binary"}
_FORM_SCHEMA = {
    "type": "object",
    "required": ["name", "adapter_config.json", "adapter_model.safetensors"],
    "properties": {
        "name": {"type": "string", "description": "before the files"},
        "alias": {"type": "string", "default": LATEST, "description": "before the files"},
        **dict.fromkeys(MAX_FILE_BYTES, _BINARY),
    },
}
_CREATED = {
    "description": "The adapter, with the version that was added.",
    "headers": {"location": {"description": "of that version", "schema": {"type": "string"}}},
}
_REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        _FORM: {"schema": _FORM_SCHEMA},
        _JSON: {"schema": ImportBody.model_json_schema()},
        **{kind: {"schema": _BINARY} for kind in _ARCHIVES},
    },
}


def make_upload_router(intake: Intake, views: Views, *, max_upload_bytes: int) -> APIRouter:
    """Return the route POST /v1/adapters.

    Args: max_upload_bytes: of a body.
    """
    router = APIRouter(route_class=OurRoute, tags=["adapters"])

    @router.post(
        "/v1/adapters",
        status_code=201,
        responses={201: _CREATED, **answers(400, 403, 408, 413, 415, 422, 507)},
        openapi_extra={"requestBody": _REQUEST_BODY},
    )
    async def add_adapter(
        request: Request,
        response: Response,
        name: Annotated[str | None, Query(description="of an archive's adapter")] = None,
        alias: Annotated[str | None, Query(description="of an archive's adapter")] = None,
    ) -> AdapterDetail:
        """Add a version and let the name's alias, else `latest`, mean it.

        It is stored once it keeps every rule and fits the base model, and named last. A form or
        an archive is an upload; JSON imports a folder below one of the server's import folders.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in (_FORM, _JSON) and kind not in _ARCHIVES:
            expected = ", ".join((_FORM, *_ARCHIVES, _JSON))
            message = f"content-type {kind[:100]!r}: one of {expected} is expected"
            raise Refusal(ErrorResponse(415, message, "unsupported_media_type"))
        if kind not in _ARCHIVES and (name is not None or alias is not None):
            param = "alias" if name is None else "name"
            raise Refusal(bad_request(param, f"{param}: in the body is expected, not in the query"))
        limit = _MAX_JSON_BYTES if kind == _JSON else max_upload_bytes
        async with aclosing(_bounded(request, limit)) as body:
            if kind == _JSON:
                added = await _import(body, intake)
            elif kind == _FORM:
                added = await _receive_form(body, request.headers["content-type"], intake)
            else:
                added = await _receive_archive(body, name, alias or LATEST, intake)
        version = f"sha256:{added.version.digest}"
        response.headers["location"] = f"/v1/adapters/{added.name}?version={version}"
        return await views.detail(added.name, version)

    return router


async def _receive_form(
    body: AsyncIterator[bytes], content_type: str, intake: Intake
) -> ResolvedVersion:
    def check(name: str, alias: str) -> None:
        check_uploadable(name, alias)
        intake.check_name(name, alias)

    async with intake.receiving() as incoming:
        names = await receive_form(body, content_type, incoming.folder, check)
        return await intake.take(incoming.folder, *names, user=current_tenant.get().name)


async def _receive_archive(
    body: AsyncIterator[bytes], name: str | None, alias: str, intake: Intake
) -> ResolvedVersion:
    if name is None:
        raise Refusal(bad_request("name", "name: missing; give it in the query"))
    check_uploadable(name, alias)
    intake.check_name(name, alias)
    async with intake.receiving() as incoming:
        archive = incoming.folder / "archive"
        await _save(body, archive)
        folder = await intake.unpack(archive, name)
        return await intake.take(folder, name, alias, user=current_tenant.get().name)


async def _import(body: AsyncIterator[bytes], intake: Intake) -> ResolvedVersion:
    try:
        wanted = ImportBody.model_validate_json(b"".join([chunk async for chunk in body]))
    except ValidationError as error:
        errors = [{**found, "loc": ("body", *found["loc"])} for found in error.errors()]
        raise Refusal(bad_values(errors)) from error
    if not current_tenant.get().may_manage(wanted.name):
        raise Refusal(not_allowed(wanted.name))
    intake.check_name(wanted.name, wanted.alias)
    folder = await asyncio.to_thread(intake.importable, wanted.path)
    if folder is None:
        message = "path: no folder below one that --import-from names, one is expected"
        raise Refusal(bad_request("path", message))
    async with intake.receiving() as incoming:
        await asyncio.to_thread(incoming.copy, folder)
        user = current_tenant.get().name
        return await intake.take(incoming.folder, wanted.name, wanted.alias, user=user)


def check_uploadable(name: str, alias: str) -> None:
    """End the route if the caller may not upload adapters of this name, whether there are any.

    Whoever may upload moves `latest`; what another alias means is for whoever manages the name.
    """
    caller = current_tenant.get()
    if not caller.may_upload(name) or not (alias == LATEST or caller.may_manage(name)):
        raise Refusal(not_allowed(name))


def not_allowed(name: str) -> ErrorResponse:
    """Return the answer for a name that the caller may not add versions to."""
    message = f"You may not add adapters named {name[:100]!r}."
    return ErrorResponse(403, message, "not_allowed", "permission_error", param="name")


async def _save(body: AsyncIterator[bytes], path: Path) -> None:
    file = await asyncio.to_thread(path.open, "wb")
    try:
        async for chunk in body:
            await asyncio.to_thread(file.write, chunk)
    finally:
        await asyncio.to_thread(file.close)


async def _bounded(request: Request, limit: int) -> AsyncGenerator[bytes]:
    """Yield the body's chunks; one above the limit ends the route, unread if it says so."""
    claimed = request.headers.get("content-length", "")
    if claimed.isdecimal() and int(claimed[:_MAX_DIGITS]) > limit:
        raise Refusal(body_too_large(limit))
    num_bytes = 0
    async with aclosing(request.stream()) as stream:
        while True:
            try:
                async with asyncio.timeout(MAX_SILENT_SECONDS):
                    chunk = await anext(stream, None)
            except TimeoutError as error:
                raise Refusal(body_too_slow(MAX_SILENT_SECONDS)) from error
            if chunk is None:
                return
            num_bytes += len(chunk)
            if num_bytes > limit:
                raise Refusal(body_too_large(limit))
            yield chunk
