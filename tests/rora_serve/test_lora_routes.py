"""vLLM's own two routes: its bodies and words, our store."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from rora_serve.api.protocol import LoadLoraBody, UnloadLoraBody
from tests.adapters.hostile.build import change_keys
from tests.rora_serve.adapter_server import Place, Rights, run


async def load(place: Place, path: Path | str, **keys: object) -> httpx.Response:
    body = {"lora_name": "b", "lora_path": str(path), **keys}
    return await place.ask("POST", "/v1/load_lora_adapter", json=body)


async def unload(place: Place, name: str) -> httpx.Response:
    return await place.ask("POST", "/v1/unload_lora_adapter", json={"lora_name": name})


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    """Return status, type and message of an error that vLLM's own model reads."""
    error = ErrorResponse.model_validate(answer.json()).error
    assert error.code == answer.status_code
    return answer.status_code, error.type, error.message


@pytest.mark.parametrize(
    ("ours", "vllms"),
    [(LoadLoraBody, LoadLoRAAdapterRequest), (UnloadLoraBody, UnloadLoRAAdapterRequest)],
)
def test_bodies_have_vllms_keys_and_defaults(ours: Any, vllms: Any) -> None:
    assert {
        name: (field.annotation, field.default) for name, field in ours.model_fields.items()
    } == {name: (field.annotation, field.default) for name, field in vllms.model_fields.items()}


def test_loading_imports_and_loads_and_a_second_time_only_loads(place: Place) -> None:
    async def ask() -> None:
        for _ in range(2):
            answer = await load(place, place.third, more="is passed over, as by vLLM")
            assert answer.status_code == 200
            assert answer.text == "Success: LoRA adapter 'b' added successfully."
            (held,) = place.server.engine.held.values()
            assert held.name == "b"
            assert (await unload(place, "b")).text == (
                "Success: LoRA adapter 'b' removed successfully."
            )
            assert place.server.engine.held == {}
        assert len(place.store.history("b")) == 1
        # What vLLM forgets stays: the next request loads it again.
        await place.server.running("b")

    run(ask())


def test_other_weights_under_a_name_take_its_place_only_if_that_is_said(place: Place) -> None:
    async def ask() -> None:
        await load(place, place.third)
        change_keys(place.third, lora_alpha=9)
        status, kind, message = error_of(await load(place, place.third))
        assert (status, kind) == (400, "InvalidUserInput")
        assert message == (
            "The lora adapter 'b' has already been loaded. If you want to load the adapter in "
            "place, set 'load_inplace' to True."
        )
        before = place.store.resolve("b").version.digest
        assert (await load(place, place.third, load_inplace=True)).status_code == 200
        assert place.store.resolve("b").version.digest != before
        assert place.store.rollback("b").version.digest == before

    run(ask())


def test_errors_are_vllms(place: Place) -> None:
    async def ask() -> None:
        user_error = (400, "InvalidUserInput")
        for answer, expected, message in (
            (await load(place, "/etc"), (404, "NotFoundError"),
             "Loading lora b failed: No adapter found for /etc"),
            (await load(place, ""), user_error, "Both 'lora_name' and 'lora_path' must be"),
            (await load(place, place.third, lora_name=""), user_error, "Both 'lora_name'"),
            (await load(place, place.third, lora_name="base"), user_error,
             "The lora adapter 'base' conflicts with a served base model."),
            (await load(place, place.third, is_3d_lora_weight=True), user_error, "is not served"),
            (await load(place, place.third, lora_name="../b"), (400, "BadRequestError"), "1 to 64"),
            (await load(place, place.third, lora_name=5), (400, "BadRequestError"), "lora_name"),
            (await unload(place, ""), user_error, "'lora_name' needs to be provided"),
            (await unload(place, "nobody"), (404, "NotFoundError"),
             "The lora adapter 'nobody' cannot be found."),
        ):  # fmt: skip
            *found, text = error_of(answer)
            assert tuple(found) == expected
            assert message in text
        (place.third / "adapter_config.json").write_text("{")
        status, kind, message = error_of(await load(place, place.third))
        assert (status, kind) == (422, "UnprocessableEntityError")
        assert "json-syntax" in message
        place.break_record()
        assert error_of(await unload(place, "a"))[:2] == (500, "InternalServerError")

    run(ask())


def test_who_may_not_manage_a_name_learns_nothing_of_it(place: Place) -> None:
    async def ask() -> None:
        place.server.tenant = Rights(use=("a",), upload=("a",))
        forbidden, missing = await unload(place, "a"), await unload(place, "z")
        assert forbidden.text.replace("'a'", "'z'") == missing.text
        assert error_of(await load(place, place.third, lora_name="a"))[:2] == (
            403, "ForbiddenError",
        )  # fmt: skip

    run(ask())
