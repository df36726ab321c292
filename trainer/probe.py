"""The probe: what the base model and the adapter answer to a few prompts, kept in rora.json.

A server computes the same prompts again before it serves the adapter, and so proves that it applies
what was trained. Its form stands in docs/format.md.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adapters.errors import AdapterMismatchError, DataError
from adapters.limits import MAX_PROBE_ANSWER_TOKENS, MAX_PROBE_PROMPT_TOKENS
from adapters.probe import Probe
from adapters.verdict import Found
from trainer.data import Sample, num_common_tokens, render
from trainer.inject import adapters_off
from trainer.lora_linear import LoraLinear
from trainer.model import BaseModel

# Of everyday kinds, and of nobody's data: an adapter may be passed on, its training data not.
_QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Is 17 larger than 12? Answer yes or no.",
)


def probe_prompts(base: BaseModel, samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    """Return prompts as token ids: a few neutral questions, and what all samples begin with.

    Of the training data only the beginning that every sample shares is used, if it is longer than
    the chat template's own.
    """
    prompts = []
    for question in _QUESTIONS:
        try:
            message = {"role": "user", "content": question}
            text = render([message], base.tokenizer, add_generation_prompt=True)
        except DataError:  # a base model without a template
            text = question
        ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(tuple(ids))
    # Nothing that an answer says, and nothing if all samples are one.
    num_shared = min(num_common_tokens(samples), *(sample.loss_places[0] for sample in samples))
    shared = samples[0].token_ids[:num_shared]
    differ = any(sample.token_ids != samples[0].token_ids for sample in samples)
    if differ and shared and not any(prompt[:num_shared] == shared for prompt in prompts):
        prompts.append(shared)
    return [prompt[:MAX_PROBE_PROMPT_TOKENS] for prompt in prompts]


@torch.no_grad()
def prompt_log_probs(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Return the log-probs of what follows each prompt, [vocabulary] each, float32, on the CPU."""
    was_training = model.training
    model.eval()
    try:
        return [
            model(input_ids=torch.tensor([prompt], device=model.device), use_cache=False)
            .logits[0, -1]
            .float()
            .log_softmax(dim=0)
            .cpu()
            for prompt in prompts
        ]
    finally:
        model.train(was_training)


def make_probe(
    base: BaseModel, layers: Mapping[str, LoraLinear], prompts: Sequence[tuple[int, ...]]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the probe as it stands in rora.json, and the adapter's log-probs in full."""
    adapter = prompt_log_probs(base.model, prompts)
    with adapters_off(layers):
        alone = prompt_log_probs(base.model, prompts)
    is_quantized = getattr(base.model.config, "quantization_config", None) is not None
    probe = {
        "dtype": str(base.model.dtype).removeprefix("torch."),
        **({"quantization": "nf4"} if is_quantized else {}),
        "prompts": [
            {"token_ids": list(prompt), "base": _top(without), "adapter": _top(with_)}
            for prompt, without, with_ in zip(prompts, alone, adapter, strict=True)
        ],
    }
    return probe, adapter


def ask_again(base: BaseModel, layers: Mapping[str, LoraLinear], probe: Probe) -> list[Found]:
    """Return what base model and adapter answer here: the log-probs of the stored tokens.

    Raises: AdapterMismatchError: a token that the base model does not know.
    """
    prompts = [prompt.token_ids for prompt in probe.prompts]
    wanted = [sorted({*p.base.token_ids, *p.adapter.token_ids}) for p in probe.prompts]
    embeddings: Any = base.model.get_input_embeddings()
    num_tokens = embeddings.num_embeddings
    largest = max(max(*ids, *tokens) for ids, tokens in zip(prompts, wanted, strict=True))
    if largest >= num_tokens:
        raise AdapterMismatchError(
            f"the probe names token {largest}, {base.name} has {num_tokens}; name the base model "
            "that the adapter was trained on"
        )
    adapter = prompt_log_probs(base.model, prompts)
    with adapters_off(layers):
        alone = prompt_log_probs(base.model, prompts)
    return [
        Found(*(dict(zip(tokens, side[tokens].tolist(), strict=True)) for side in sides))
        for tokens, *sides in zip(wanted, alone, adapter, strict=True)
    ]


def _top(log_probs: Tensor) -> dict[str, list[Any]]:
    """Return the most likely tokens, the first one first."""
    top = log_probs.topk(min(MAX_PROBE_ANSWER_TOKENS, len(log_probs)))
    return {
        "token_ids": top.indices.tolist(),
        "log_probs": [round(value, 6) for value in top.values.tolist()],
    }
