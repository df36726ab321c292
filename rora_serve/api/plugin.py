"""Putting our routes and the resolved adapter into vLLM's app, behind the front door."""

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from rora_serve.api.front_door import FrontDoor, current_adapter
from rora_serve.api.reception import RECEPTION_STATE, Reception
from rora_serve.chat_templates import MAX_WORK

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


def with_own_templates(
    preprocess_chat: Callable[..., Awaitable[Any]],
) -> Callable[..., Awaitable[Any]]:
    """Return what renders a chat by the template of the current request's adapter, if it has one.

    vLLM's chat, responses and tokenize handlers all come through it, in the request's task, after
    they refused what a client may not bring; a template that they let in from a client goes first.
    """

    async def render(
        request: Any, messages: list[Any], default_template: str | None, *rest: Any, **options: Any
    ) -> Any:
        adapter = current_adapter.get()
        own = None if adapter is None else adapter.chat_template
        if own is None or getattr(request, "chat_template", None) is not None:
            return await preprocess_chat(request, messages, default_template, *rest, **options)
        others = [
            getattr(request, "chat_template_kwargs", None),
            getattr(request, "documents", None),
        ]
        try:
            work = own.work(
                [_plain(message) for message in messages], options["tool_dicts"], others
            )
        except (TypeError, ValueError) as error:
            raise VLLMValidationError(str(error)) from error
        if work > MAX_WORK:
            raise VLLMValidationError(
                f"the adapter's chat template may write {work} characters for this request, at "
                f"most {MAX_WORK} are served; send fewer or shorter messages and tools"
            )
        return await preprocess_chat(request, messages, own.text, *rest, **options)

    return render


def _plain(message: Any) -> Any:
    """Return a message as plain JSON; what pydantic left to be read once becomes a list in it."""
    if not isinstance(message, dict):
        return message.model_dump()
    for key, value in message.items():
        if isinstance(value, Iterator):
            message[key] = list(value)
    return message


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
    renderer = app.state.online_renderer
    renderer.preprocess_chat = with_own_templates(renderer.preprocess_chat)
    app.router.routes[:0] = routes  # before vLLM's own /v1/models
    setattr(app.state, RECEPTION_STATE, reception)
