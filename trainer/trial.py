"""What a model allows in training, found out on the model itself before a run starts.

Packing must give every sample what it gets alone. Whether a model does that can not be read off its
name, so a row of made-up samples goes through it, and again with other neighbours.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.attention import PACKED, PackedLayout, PackingError
from trainer.batching import Batch, pack, pad
from trainer.data import Sample
from trainer.loss import ModelLoss, body, forward_inputs
from trainer.model import BaseModel

# Of made-up samples, the longest first as in a row; in several groups of similar length.
_LENGTHS = (23, 14, 13, 9, 6)
_NUM_SHARED = 4
# Largest change of a sample's hidden states, of their largest, when its neighbours change. None at
# all in a dense model; experts are multiplied in other groups then, which rounds otherwise.
_MAX_CHANGE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.005}
# Largest mean difference of hidden states, of their mean size, between a row and samples alone.
_MAX_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}
_ROPE_BY_LENGTH = {"dynamic", "longrope"}


def find_model_loss(
    base: BaseModel, *, longest: int, packing: bool
) -> tuple[ModelLoss, str | None]:
    """Return the fastest ModelLoss that gives this model's own losses.

    The model's attention is switched over if samples can be packed, and left alone if not.

    Args:
        longest: tokens of the longest sample to come; longer ones will be padded.
        packing: false: do not pack, whether it works or not.
    Returns: and why the samples are padded, if they are though packing was asked for.
    Cost: a dozen forwards of fewer than 70 tokens.
    """
    model = base.model
    was_training = model.training
    model.eval()
    try:
        loss = ModelLoss(base, packs=False, shares_prefix=False, plain_head=_has_plain_head(model))
        reason = _why_not_packed(base, longest) if packing else None
        if not packing or reason is not None:
            return loss, reason
        shares_prefix = not _is_random(base)
    finally:
        model.train(was_training)
    return replace(loss, packs=True, shares_prefix=shares_prefix, longest_packed=longest), None


@dataclass(frozen=True)
class _CountingLayout(PackedLayout):
    """Counts the layers whose attention keeps to it."""

    uses: list[None] = field(default_factory=list)

    def attended(self) -> None:
        self.uses.append(None)


def _why_not_packed(base: BaseModel, longest: int) -> str | None:
    """Return a reason, or None with the model's attention switched over."""
    model = base.model
    own_attention = model.config._attn_implementation
    reason = _foreign_settings(model)
    if reason is not None:
        return reason
    try:
        alone = [_hidden(model, _padded(base, [sample]))[0] for sample in _made_up(model)]
        model.set_attn_implementation(PACKED)
        reason = _packing_fault(base, alone, longest)
    except PackingError as error:
        reason = str(error)
    except Exception as error:
        reason = (
            f"it does not take them ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        )
    if reason is not None:
        model.set_attn_implementation(own_attention)
    return reason


def _packing_fault(base: BaseModel, alone: Sequence[Tensor], longest: int) -> str | None:
    """Compare packed samples with the same ones alone, and with themselves beside others."""
    model = base.model
    samples = _made_up(model)
    for share_prefix in (True, False):
        batch = pack(samples, share_prefix=share_prefix, device=model.device)
        assert batch.layout is not None
        layout = _CountingLayout(batch.layout.num_prefix, batch.layout.groups, longest)
        together = _per_sample(_hidden(model, replace(batch, layout=layout)), batch)
        num_layers = model.config.get_text_config().num_hidden_layers
        if len(layout.uses) != num_layers:
            return f"{num_layers - len(layout.uses)} of its {num_layers} layers do not attend"
        for own, other in zip(together, alone, strict=True):
            own_part = other[-len(own) :]
            if not _mean(own - own_part) <= _MAX_DIFFERENCE[model.dtype] * _mean(own_part):
                return "packed samples do not compute what they compute alone"
        for kept in range(len(samples)):
            neighbours = pack(
                _made_up(model, changed_but=kept), share_prefix=share_prefix, device=model.device
            )
            again = _per_sample(_hidden(model, neighbours), neighbours)[kept]
            before = together[kept]
            if not _largest(again - before) <= _MAX_CHANGE[model.dtype] * _largest(before):
                return "a sample's neighbours change what it computes"
    return None


def _foreign_settings(model: PreTrainedModel) -> str | None:
    """Name what a model's configuration says that only shows in longer rows than are tried."""
    config = model.config.get_text_config()
    others = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    if others:
        return f"it has layers of {', '.join(sorted(others))}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention works in chunks"
    rope = set(_rope_types(getattr(config, "rope_parameters", None)))
    if rope & _ROPE_BY_LENGTH:
        return "its rotary positions depend on the longest sample beside a token"
    return None


def _rope_types(parameters: Any) -> Iterator[str]:
    """Yield the kinds of rotary positions that a configuration names, by layer type or not."""
    if isinstance(parameters, Mapping):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)


def _is_random(base: BaseModel) -> bool:
    """Tell whether the model itself draws random numbers in training, as dropout does."""
    model = base.model
    batch = _padded(base, _made_up(model))
    model.train()
    # Its own numbers must not depend on whether this was asked.
    with torch.random.fork_rng():
        results = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            results.append(_hidden(model, batch))
    model.eval()
    change = _largest(results[0] - results[1])
    return not change <= _MAX_CHANGE[model.dtype] * _largest(results[0])


def _made_up(model: PreTrainedModel, *, changed_but: int | None = None) -> list[Sample]:
    """Return samples of random tokens that share a beginning.

    Args: changed_but: give all other samples other tokens behind the beginning.
    """
    size: int = model.config.get_text_config().vocab_size
    samples = []
    for index, length in enumerate(_LENGTHS):
        changed = changed_but is not None and index != changed_but
        generator = torch.Generator().manual_seed(index + 100 * changed)
        own = torch.randint(1, size, (length - _NUM_SHARED,), generator=generator).tolist()
        # No two go on alike, so that just this much is shared.
        own[0] = 1 + (7 * index + 3 * changed) % (size - 1)
        tokens = (*range(1, 1 + _NUM_SHARED), *own)
        samples.append(Sample(tokens, tuple(place > _NUM_SHARED for place in range(length))))
    return samples


def _padded(base: BaseModel, samples: Sequence[Sample]) -> Batch:
    return pad(samples, pad_token_id=base.pad_token_id, device=base.model.device)


@torch.no_grad()
def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the hidden states before the output layer, [num_rows, num_columns, hidden]."""
    hidden: Tensor = body(model)(**forward_inputs(batch)).last_hidden_state
    return hidden.float()


def _per_sample(hidden: Tensor, batch: Batch) -> list[Tensor]:
    """Cut a row into its samples behind the prefix, [num_tokens, hidden] each."""
    assert batch.layout is not None
    num_prefix = batch.layout.num_prefix
    return list(hidden[0, num_prefix:].split([length - num_prefix for length in _LENGTHS]))


def _mean(values: Tensor) -> float:
    return float(values.abs().mean())


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


@torch.no_grad()
def _has_plain_head(model: PreTrainedModel) -> bool:
    """Tell whether the model's logits are just its output layer applied to its body's output.

    Some models scale or cap them; asked by computing both for a few tokens.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or model.base_model is model:
        return False
    token_ids = torch.arange(1, 5, device=model.device)[None]
    hidden = body(model)(input_ids=token_ids, use_cache=False).last_hidden_state
    logits = model(input_ids=token_ids, use_cache=False).logits
    return bool(torch.equal(head(hidden).to(logits.dtype), logits))
