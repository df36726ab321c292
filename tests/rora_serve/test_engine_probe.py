"""What vLLM's engine is asked for a probe; that a real one answers so is test_probe_served's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.logprobs import Logprob
from vllm.v1.sample import sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata

from adapters import AdapterStore, ResolvedVersion, Version
from adapters.errors import AdapterMismatchError, EngineSeamError
from adapters.verdict import LogProbs
from rora_serve.engine.compat import rank_tokens_uncompiled
from rora_serve.engine_probe import make_prober
from rora_serve.models import ServedAdapter
from rora_serve.probing import Prober

DIGEST = "1" * 64
SERVED = ServedAdapter(
    "a", ResolvedVersion("a", Version(DIGEST, "2" * 64, 1, 1, 1, 1), Path("/adapter")), 7
)


class Engine:
    """Stands for vLLM's client: its configuration, and one answer."""

    def __init__(self, **model: Any) -> None:
        settings = {
            "dtype": torch.bfloat16, "quantization": None, "enforce_eager": True,
            "max_model_len": 64, "max_logprobs": 20,
        }  # fmt: skip
        self.model_config = SimpleNamespace(**(settings | model), get_vocab_size=lambda: 1000)
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config, cache_config=SimpleNamespace(cache_dtype="auto")
        )
        self.answer: Any = [{3: Logprob(-0.5), 9: Logprob(-2.0)}]
        self.requests: list[dict[str, Any]] = []

    async def generate(
        self, prompt: Any, params: Any, request_id: str, *, lora_request: Any
    ) -> AsyncIterator[Any]:
        self.requests.append(
            {"prompt": prompt, "params": params, "id": request_id, "lora": lora_request}
        )
        if isinstance(self.answer, Exception):
            raise self.answer
        yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=self.answer)])


def prober(engine: Engine) -> Prober:
    return make_prober(engine, AdapterStore(Path("none")), fingerprint="f" * 64)  # type: ignore[arg-type]


def ask(engine: Engine, served: ServedAdapter | None) -> LogProbs:
    async def asked() -> LogProbs:
        return await prober(engine)._next_log_probs((1, 2), served)

    return asyncio.run(asked())


def test_the_likeliest_tokens_are_asked_for_past_the_prefix_cache() -> None:
    engine = Engine()
    assert ask(engine, SERVED) == {3: -0.5, 9: -2.0}
    assert ask(engine, None) == {3: -0.5, 9: -2.0}
    of_adapter, of_base = engine.requests
    assert of_adapter["prompt"]["prompt_token_ids"] == [1, 2]
    salts = {one["prompt"]["cache_salt"] for one in engine.requests}
    assert len(salts) == len({one["id"] for one in engine.requests}) == 2
    assert (of_adapter["lora"].lora_name, of_adapter["lora"].lora_int_id) == ("2" * 64, 7)
    assert of_adapter["lora"].lora_path == "/adapter"
    assert of_base["lora"] is None
    params = of_base["params"]
    assert (params.max_tokens, params.temperature, params.logprobs) == (1, 0.0, 20)


@pytest.mark.parametrize(("limit", "asked"), [(20, 20), (5, 5), (0, 0), (-1, 20), (50, 20)])
def test_no_more_is_asked_than_vllm_was_told_to_give(limit: int, asked: int) -> None:
    engine = Engine(max_logprobs=limit)
    ask(engine, None)
    assert engine.requests[0]["params"].logprobs == asked


def test_a_prompt_that_vllm_refuses_is_the_adapters_fault() -> None:
    engine = Engine()
    engine.answer = VLLMValidationError("Token id 5000 is out of vocabulary")
    with pytest.raises(AdapterMismatchError, match="can not be asked here: Token id 5000 is out"):
        ask(engine, SERVED)


@pytest.mark.parametrize("answer", [None, []])
def test_an_engine_that_gives_no_log_probs_is_no_verdict(answer: Any) -> None:
    engine = Engine()
    engine.answer = answer
    with pytest.raises(EngineSeamError, match=r"gave rora-probe-\w+ no log-probs"):
        ask(engine, SERVED)


def test_a_build_is_all_that_decides_what_is_computed() -> None:
    first = prober(Engine())
    assert first.build.endswith(
        "cpu, bfloat16 with a cache in bfloat16, quantization none, eager, base ffffffffffff"
    )
    others = [
        prober(Engine(dtype=torch.float32)),
        prober(Engine(quantization="awq")),
        prober(Engine(enforce_eager=False)),
    ]
    assert len({first.build, *(other.build for other in others)}) == 4


@pytest.mark.parametrize(
    ("model", "cache", "form"),
    [
        ({}, "auto", "bfloat16"),
        ({}, "bfloat16", "bfloat16"),
        ({}, "fp8_e4m3", "quantized"),
        ({"quantization": "awq"}, "auto", "quantized"),
        ({"dtype": torch.float32}, "auto", "float32"),
        ({"dtype": torch.float16}, "auto", "float16"),
    ],
)
def test_the_form_is_the_least_exact_of_weights_and_cache(
    model: dict[str, Any], cache: str, form: str
) -> None:
    engine = Engine(**model)
    engine.vllm_config.cache_config.cache_dtype = cache
    assert prober(engine)._form == form


def test_vllms_way_of_naming_tokens_still_harms_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Why the likeliest are asked for. When this fails, tokens can be named instead."""
    module: Any = sampler
    theirs = module.batched_count_greater_than
    monkeypatch.setattr(module, "batched_count_greater_than", theirs)  # to be put back
    rank_tokens_uncompiled()
    log_probs = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]).log()
    nothing = torch.empty(0)
    step = SamplingMetadata(
        temperature=None, all_greedy=True, all_random=False, top_p=None, top_k=None,
        generators={}, max_num_logprobs=2, no_penalties=True, prompt_token_ids=None,
        frequency_penalties=nothing, presence_penalties=nothing, repetition_penalties=nothing,
        output_token_ids=[[], []], allowed_token_ids_mask=None, bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )  # fmt: skip

    def first_rows(step: SamplingMetadata) -> list[list[float]]:
        """What the first request gets, which asks for its two likeliest tokens."""
        found = sampler.Sampler().forward(log_probs, step).logprobs_tensors
        assert found is not None
        return [found.logprob_token_ids[0].tolist(), found.logprobs[0].exp().tolist()]

    assert first_rows(step) == [[2, 2, 1], pytest.approx([0.7, 0.7, 0.2])]
    step.logprob_token_ids = {1: [0, 2]}  # what another request of the step names
    assert first_rows(step) == [[2, 0, 0], pytest.approx([0.7, 0.0, 0.0])]
