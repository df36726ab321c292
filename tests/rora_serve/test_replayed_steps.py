"""A model's steps of decoding are replayed once a rehearsal has shown that they are the model's."""

import importlib
from contextlib import AbstractContextManager
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.forward_context import override_forward_context
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from tests.rora_serve.test_replay import (
    ATOL,
    HEAD_DIM,
    HIDDEN,
    NUM_BLOCKS,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    Model,
    TokenByToken,
    as_in_a_worker,
    new_step,
    token_by_token,
)

# As rora_serve.engine.worker does: numba must come after vLLM.
backend = importlib.import_module("rora_serve.engine.attention_backend")
decoding = importlib.import_module("rora_serve.engine.decoding")
replayed_steps = importlib.import_module("rora_serve.engine.replayed_steps")
replay = importlib.import_module("rora_serve.engine.replay")

MAX_ROWS, VOCABULARY = 9, 30
__all__ = ["as_in_a_worker"]  # holds for these tests too


@pytest.fixture(autouse=True)
def without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's attention asks for a configuration, and of prompts for what an engine plans."""
    monkeypatch.setattr(
        "vllm.v1.attention.backends.cpu_attn.get_current_vllm_config",
        lambda: SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32)),
    )
    layer = TokenByToken(decoding.DecodeLayer(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, 0.3))

    def attend(
        _: Any, __: Any, query: Tensor, key: Tensor, value: Tensor, cache: Tensor, metadata: Any,
        output: Tensor, *___: Any,
    ) -> Tensor:  # fmt: skip
        layer.attend(query, (key, value), cache, output, metadata.scheduler_metadata)
        return output

    monkeypatch.setattr(CPUAttentionBackendImpl, "forward", attend)
    monkeypatch.setattr(CPUAttentionBackendImpl, "do_kv_cache_update", lambda *_: None)


class AsVllms:
    """A layer of attention, by our backend."""

    def __init__(self) -> None:
        self._layer = SimpleNamespace(kv_sharing_target_layer_name=None)
        self._impl = backend.DecodeImpl(
            num_heads=NUM_HEADS, head_size=HEAD_DIM, scale=0.3, num_kv_heads=NUM_KV_HEADS,
            alibi_slopes=None, sliding_window=None, kv_cache_dtype="auto",
        )  # fmt: skip

    def attend(
        self, query: Tensor, new: tuple[Tensor, Tensor], cache: Tensor, output: Tensor, told: Any
    ) -> None:
        self._impl.forward(self._layer, query, *new, cache, told, output)


class Served:
    """What the worker calls: `forward` by vLLM's names, and how often the layers ran one by one."""

    def __init__(self) -> None:
        self.layers = Model()
        self.layers.attention = [AsVllms() for _ in range(NUM_LAYERS)]
        self.embeddings = torch.randn(VOCABULARY, HIDDEN)
        self.num_calls = 0
        self.metadata: Any = None

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.embeddings[input_ids]

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Any:
        assert intermediate_tensors is None
        self.num_calls += 1
        hidden = inputs_embeds
        if hidden is None:
            assert input_ids is not None
            hidden = self.embed_input_ids(input_ids)
        self.layers.step = self.metadata
        return self.layers(hidden, positions)


def told_of(served: Served, step: Any) -> AbstractContextManager[None]:
    """Let all layers be told of a step of decoding, or of steps of one token that others are."""
    names = [field.name for field in fields(backend.DecodeMetadata)]
    if isinstance(step, decoding.DecodeStep):
        told = {"decode": step, "num_actual_tokens": step.num_seqs}
    else:
        told = {"scheduler_metadata": step, "num_actual_tokens": len(step)}
    served.metadata = backend.DecodeMetadata(**dict.fromkeys(names) | told)
    return in_context({"first": served.metadata, "second": served.metadata})


def in_context(attn_metadata: Any) -> AbstractContextManager[None]:
    context: Any = SimpleNamespace(attn_metadata=attn_metadata)
    return override_forward_context(context)


def rehearsed(served: Served, *, num_blocks: int = NUM_BLOCKS) -> Any:
    steps = replayed_steps.ReplayedSteps(served, served.layers.batch, max_rows=MAX_ROWS)
    served.layers.batch.set_rows([1] * 3, [1] * 3, {1: served.layers.slot_of_all()})
    with told_of(served, new_step([1, 1, 1])), steps.rehearsal(num_blocks):
        served.forward(torch.arange(3), torch.arange(3))
        served.layers.batch.set_rows([1] * 4, [1] * 4, {1: served.layers.slot_of_all()})
        with told_of(served, token_by_token([(0, 1), (0, 3)])):
            served.forward(torch.arange(4), torch.arange(4))
    served.layers.batch.clear()
    return steps


def test_steps_are_replayed_if_they_are_short_and_others_are_not() -> None:
    served = Served()
    plain = served.forward
    steps = rehearsed(served)
    assert not steps.problem
    ids, positions = torch.arange(4), torch.arange(4)
    served.layers.batch.set_rows([0, 7, 7, 0], [0, 7, 7, 0], {7: served.layers.slot(7)})

    def asked(step: Any, **more: Any) -> tuple[Tensor, int]:
        with told_of(served, step):
            before = served.num_calls
            found: Tensor = served.forward(ids, positions, **more)
            return found, served.num_calls - before

    decode, prompts = new_step([3, 20, 1, 1]), token_by_token([(0, 3), (9, 1)])
    for step in (decode, prompts):
        with told_of(served, step):
            expected = plain(ids, positions)
        found, num_calls = asked(step)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)
        assert num_calls == 0
        found, num_calls = asked(step, inputs_embeds=served.embed_input_ids(ids))
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)
        assert num_calls == 0
        assert asked(step, token_type_ids=ids)[1] == 1, "what a recording does not have"
    served.metadata, before = None, served.num_calls
    with in_context(None):
        served.forward(ids, positions)
    assert served.num_calls == before + 1, "a dummy run"
    with told_of(served, prompts):
        served.metadata.num_actual_tokens = 3
        served.forward(ids, positions)
    assert served.num_calls == before + 2, "rows that are no tokens"
    ids = positions = torch.arange(MAX_ROWS + 1)
    served.layers.batch.clear()
    assert asked(new_step([2] * (MAX_ROWS + 1)))[1] == 1, "more rows than were recorded"
    assert asked(token_by_token([(0, MAX_ROWS + 1)]))[1] == 1, "more rows than were recorded"


def test_without_a_rehearsal_nothing_is_replayed() -> None:
    served = Served()
    steps = replayed_steps.ReplayedSteps(served, served.layers.batch, max_rows=MAX_ROWS)
    with told_of(served, new_step([1, 1])):
        served.forward(torch.arange(2), torch.arange(2))
    assert served.num_calls == 1
    assert steps.problem == "no step of decoding was rehearsed"


def why_not(served: Served, **options: int) -> str:
    steps = rehearsed(served, **options)
    with told_of(served, new_step([1, 1])):
        before = served.num_calls
        served.forward(torch.arange(2), torch.arange(2))
        assert served.num_calls == before + 1, "it is served all the same"
    return str(steps.problem)


def test_a_model_that_does_more_is_served_layer_by_layer() -> None:
    served = Served()
    served.layers.extra = lambda hidden: hidden.mul_(0.5)
    assert why_not(served) == "there is no compiled function for aten.mul_.Tensor"


def test_a_model_that_needs_what_a_recording_has_not_is_served_layer_by_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    served = Served()
    plain = served.forward

    def by_ids(input_ids: Tensor | None, *arguments: Any, **options: Any) -> Any:
        if input_ids is None:
            raise TypeError("no tokens")
        return plain(input_ids, *arguments, **options)

    monkeypatch.setattr(served, "forward", by_ids)
    assert why_not(served) == "TypeError: no tokens"


@pytest.mark.parametrize(
    ("way", "what"),
    [
        ("run", "a replayed step of 3 sequences"),
        ("run_between", "a replayed step with prompts, of 4 tokens,"),
    ],
)
def test_a_recording_that_differs_from_the_model_is_thrown_away(
    way: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = getattr(replay.Plan, way)

    def run_wrongly(plan: Any, hidden: Tensor, *arguments: Any) -> Tensor:
        found: Tensor = run(plan, hidden, *arguments)
        found[-1, -1] += 0.1
        return found

    monkeypatch.setattr(replay.Plan, way, run_wrongly)
    assert why_not(Served()).startswith(f"{what} is off by ")


def test_a_recording_without_adapters_would_answer_in_their_names() -> None:
    served = Served()
    for product in served.layers.products:
        product.add(None)
    assert why_not(served) == "no layer that adapters change was called"


def test_attention_that_is_not_the_backends_is_not_asked_for_prompts() -> None:
    served = Served()
    plain = Model().attention[1]

    def attend(query: Tensor, new: Any, cache: Tensor, output: Tensor, told: Any) -> None:
        if told.decode is None:
            TokenByToken(plain).attend(query, new, cache, output, told.scheduler_metadata)
        else:
            plain.attend(query, new, cache, output, told.decode)

    served.layers.attention[1] = SimpleNamespace(attend=attend)
    assert why_not(served) == "a layer attends past vLLM's backend"


def test_a_cache_of_too_few_blocks_is_not_written_beyond() -> None:
    message = why_not(Served(), num_blocks=3)
    assert message == "the KV cache has 3 blocks, more than 3 are needed to try it"
