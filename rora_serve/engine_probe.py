"""What vLLM's engine answers next to a prompt, for rora_serve.probing."""

import secrets
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, cast

import vllm
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from adapters import AdapterStore
from adapters.errors import AdapterMismatchError, EngineSeamError
from adapters.tolerance import Form
from adapters.verdict import LogProbs
from rora_serve.models import ServedAdapter
from rora_serve.probing import NextLogProbs, Prober, base_in_build

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.engine.protocol import EngineClient

# What vLLM gives at most unless it is told otherwise, and enough: the stored tokens are the 8
# likeliest.
_NUM_LIKELIEST = 20


def make_prober(
    engine: "EngineClient",
    store: AdapterStore,
    *,
    fingerprint: str,
    quarantined: Callable[[str], None] = lambda _: None,
) -> Prober:
    """Return what checks probes in a running engine.

    Args:
        fingerprint: of the base model that it runs.
        quarantined: as in Prober.
    """
    config = engine.vllm_config
    return Prober(
        store,
        _next_log_probs(engine),
        build=_build(config, fingerprint),
        form=_form(config),
        max_prompt_tokens=config.model_config.max_model_len - 1,  # the answer is one more
        quarantined=quarantined,
    )


def _next_log_probs(engine: "EngineClient") -> NextLogProbs:
    limits = [_NUM_LIKELIEST, engine.model_config.get_vocab_size()]
    if engine.model_config.max_logprobs >= 0:  # -1: of all tokens
        limits.append(engine.model_config.max_logprobs)
    params = SamplingParams(
        max_tokens=1,
        temperature=0,
        # Not `logprob_token_ids`, which would name the stored tokens: in vLLM 0.32 (v1/sample/
        # sampler.py) such a request takes the log-probs of all others in its step away.
        logprobs=min(limits),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )

    async def next_log_probs(token_ids: Sequence[int], served: ServedAdapter | None) -> LogProbs:
        lora_request = None
        if served is not None:
            lora_request = LoRARequest(served.engine_name, served.lora_int_id, served.folder)
        # With a salt that nobody else has, nothing comes from the prefix cache and nothing stays.
        prompt = tokens_input(list(token_ids), cache_salt=secrets.token_hex())
        request_id = f"rora-probe-{secrets.token_hex(8)}"
        try:
            answers = [
                output.outputs[0].logprobs
                async for output in engine.generate(
                    prompt, params, request_id, lora_request=lora_request
                )
            ]
        except VLLMClientError as error:
            raise AdapterMismatchError(f"its probe can not be asked here: {error}") from error
        if not answers or not answers[-1]:
            raise EngineSeamError(f"the engine gave {request_id} no log-probs; its log says why")
        return {token: found.logprob for token, found in answers[-1][0].items()}

    return next_log_probs


def _form(config: "VllmConfig") -> Form:
    dtype = cast("Form", _dtype(config))  # vLLM computes in no other
    has_few_bits = config.model_config.quantization is not None
    return "quantized" if has_few_bits or _cache_dtype(config) != dtype else dtype


def _build(config: "VllmConfig", fingerprint: str) -> str:
    """Return all that decides what the engine computes, in words."""
    parts = [
        f"rora-serve {version('rora-serve')}",
        f"vllm {vllm.__version__}",
        current_platform.device_type,
        f"{_dtype(config)} with a cache in {_cache_dtype(config)}",
        f"quantization {config.model_config.quantization or 'none'}",
        "eager" if config.model_config.enforce_eager else "compiled",
        base_in_build(fingerprint),
    ]
    return ", ".join(parts)


def _dtype(config: "VllmConfig") -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


def _cache_dtype(config: "VllmConfig") -> str:
    cache = config.cache_config.cache_dtype
    return _dtype(config) if cache == "auto" else cache
