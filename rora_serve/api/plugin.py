"""Putting our routes and the resolved adapter into vLLM's app, behind the front door."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from rora_serve.api.front_door import EXPOSED_HEADERS, FrontDoor, current_adapter
from rora_serve.api.reception import RECEPTION_STATE, Reception
from rora_serve.chat_templates import ChatTemplate, ChatTemplateError, TemplateProcess
from rora_serve.engine.compat import (
    refuse_outlines_unasked,
    replace_template_writer,
    without_developer,
)
from rora_serve.request_log import current_record

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.routing import BaseRoute


class RequestAdapters(Mapping[str, LoRARequest]):
    """The current request's adapter, or none, where vLLM's handlers look up loaded adapters.

    It iterates over nothing: vLLM looks through the values for adapters named like a kind of
        content
    ("text", "image") and would give such a one to base requests.
    """

    def __getitem__(self, model: str) -> LoRARequest:
        adapter = current_adapter.get()
        if adapter is None or model != adapter.requested:
            raise KeyError(model)
        return LoRARequest(
            lora_name=adapter.engine_name,
            lora_int_id=adapter.lora_int_id,
            lora_path=adapter.folder,
        )

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


# The own template that the current request's chat is written by, once it is known to be.
_writing: ContextVar[ChatTemplate | None] = ContextVar("_writing", default=None)


def with_own_templates(
    preprocess_chat: Callable[..., Awaitable[Any]], *, can_write: bool
) -> Callable[..., Awaitable[Any]]:
    """Return what reads a chat for the template of the current request's adapter, if it has one.

    Args: can_write: whether the base model's tokenizer goes by templates at all.

    vLLM's chat, responses and tokenize handlers all come through it, in the request's task, after
    they refused what a client may not bring; a template that they let in from a client goes first.
    """

    async def preprocess(
        request: Any,
        messages: list[Any],
        default_template: str | None,
        default_template_content_format: str,
        *rest: Any,
        **options: Any,
    ) -> Any:
        adapter = current_adapter.get()
        is_given = getattr(request, "chat_template", None) is not None
        own = None if adapter is None or is_given else adapter.chat_template
        if own is not None and not can_write:
            raise VLLMValidationError(
                "The adapter has a chat template of its own, and the base model's tokenizer writes "
                "chats without one."
            )
        content_format = default_template_content_format if own is None else own.content_format
        token = _writing.set(own)
        try:
            return await preprocess_chat(
                request, messages, default_template, content_format, *rest, **options
            )
        finally:
            _writing.reset(token)

    return preprocess


def with_own_text(
    apply_template: Callable[..., Awaitable[Any]], templates: TemplateProcess
) -> Callable[..., Awaitable[Any]]:
    """Return what writes a chat that vLLM has read, by the adapter's own template if it has one.

    The template never comes near vLLM's own code, which looks through it on the server's loop.
    """

    async def write(model_config: Any, tokenizer: Any, messages: Any, **options: Any) -> Any:
        own = _writing.get()
        if own is None:
            return await apply_template(model_config, tokenizer, messages, **options)
        chat = {name: value for name, value in options.items() if name not in _OF_THE_CALL}
        chat = {**tokenizer.special_tokens_map, **chat}
        chat["messages"] = without_developer(messages, own.text)
        try:
            text = await asyncio.wrap_future(templates.write(own.text, chat, user=_user()))
        except ChatTemplateError as error:
            raise VLLMValidationError(f"The adapter's chat template: {error}") from error
        if not model_config.enable_prompt_embeds:
            return text  # which vLLM takes apart in a thread of its own, whatever a client says
        return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=False)

    return write


def _user() -> str:
    record = current_record.get()
    return "" if record is None else record.tenant or ""


# Of transformers' apply_chat_template, not of templates.
_OF_THE_CALL = frozenset({"chat_template", "tokenize", "return_dict", "tokenizer_kwargs"})


def let_browsers_read(app: "FastAPI") -> None:
    """Put vLLM's CORS outside the front door, whose refusals browsers may read then."""
    kinds: list[object] = [entry.cls for entry in app.user_middleware]
    settings: dict[str, Any] = app.user_middleware.pop(kinds.index(CORSMiddleware)).kwargs
    settings["expose_headers"] = [name.decode() for name in EXPOSED_HEADERS]
    app.user_middleware.insert(0, Middleware(CORSMiddleware, **settings))
    app.middleware_stack = None  # built by vLLM already; the first request builds it anew


# What vLLM's --middleware takes.
FRONT_DOOR = f"{FrontDoor.__module__}.{FrontDoor.__qualname__}"


def install(app: "FastAPI", reception: Reception, routes: "Sequence[BaseRoute]") -> None:
    """Let `app`, built and set up by vLLM, serve adapters behind the front door.

    Args: routes: of our own, which come before vLLM's.
    """
    serving_models = app.state.openai_serving_models
    base_name = reception.directory.base_names[0]

    def model_name(lora_request: LoRARequest | None = None) -> str:
        adapter = current_adapter.get()
        # The engine knows the adapter by its digest; clients get back the name that they sent.
        return base_name if lora_request is None or adapter is None else adapter.requested

    serving_models.lora_requests = RequestAdapters()
    serving_models.model_name = model_name
    online = app.state.online_renderer
    templates = reception.directory.templates
    can_write = replace_template_writer(
        online.renderer, lambda write: with_own_text(write, templates)
    )
    online.preprocess_chat = with_own_templates(online.preprocess_chat, can_write=can_write)
    refuse_outlines_unasked()
    let_browsers_read(app)
    app.router.routes[:0] = routes  # before vLLM's own /v1/models
    setattr(app.state, RECEPTION_STATE, reception)
