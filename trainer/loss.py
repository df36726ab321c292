"""Cross-entropy of the tokens that carry loss, without computing what no loss needs.

Owns how samples go through a model: packed or padded, and which logits are formed. What a model
allows is found out in trial.py.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.batching import Batch, pack, pad
from trainer.data import Sample
from trainer.lora_linear import only_rows
from trainer.model import BaseModel

# Logits that are formed at once: 64 MiB in float32, 340 rows of a vocabulary of 49,152.
_CHUNK_LOGITS = 2**24


@dataclass(frozen=True)
class ModelLoss:
    """Losses of samples by one model.

    Args:
        base: the model, with whatever adapter is in it.
        packs: samples stand in one row; else they are padded.
        longest_packed: tokens of the longest sample that may be packed; a batch with a longer
            one is padded.
        shares_prefix: the tokens that all samples of a row begin with are computed once.
        plain_head: the logits are just the output layer's; then only those of tokens with loss are
            formed, in chunks, and none is kept for the backward pass.
        neftune_alpha: strength of the noise on embeddings in training; 0 is none.
    """

    base: BaseModel
    packs: bool
    shares_prefix: bool
    plain_head: bool
    longest_packed: int = sys.maxsize
    neftune_alpha: float = 0.0

    def make_batch(self, samples: Sequence[Sample]) -> Batch:
        """Return samples as this model takes them, on its device."""
        device = self.base.model.device
        if self.packs and max(map(len, samples)) <= self.longest_packed:
            return pack(samples, share_prefix=self.shares_prefix, device=device)
        return pad(samples, pad_token_id=self.base.pad_token_id, device=device)

    def token_losses(self, batch: Batch) -> Tensor:
        """Return -log p of every token of `batch` that carries loss, [num_loss], float32."""
        model = self.base.model
        inputs = forward_inputs(batch)
        if self.neftune_alpha and model.training:
            del inputs["input_ids"]
            inputs["inputs_embeds"] = _noisy_embeddings(model, batch, self.neftune_alpha)
        # What is computed again in the backward pass is so without this.
        real_rows = None if model.is_gradient_checkpointing else batch.real_rows
        with only_rows(real_rows, batch.token_ids.numel()):
            return self._losses(model, inputs, batch)

    def _losses(self, model: PreTrainedModel, inputs: dict[str, Any], batch: Batch) -> Tensor:
        if self.plain_head:
            hidden = body(model)(**inputs).last_hidden_state.flatten(0, 1)[batch.loss_places]
            head = model.get_output_embeddings()
            assert isinstance(head, nn.Linear)
            losses: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
                hidden, head.weight, head.bias, batch.targets
            )
            return losses
        logits = model(**inputs).logits.flatten(0, 1)[batch.loss_places]
        return F.cross_entropy(logits.float(), batch.targets, reduction="none")

    @torch.no_grad()
    def sample_losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Return each sample's summed loss, float64, and tokens with loss, both [num_samples]."""
        batch = self.make_batch(samples)
        losses = self.token_losses(batch).double().cpu()
        sums = torch.zeros(len(samples), dtype=torch.float64).index_add_(0, batch.owners, losses)
        return sums, torch.bincount(batch.owners, minlength=len(samples))


def forward_inputs(batch: Batch) -> dict[str, Any]:
    """Return a batch as the arguments of a model's forward."""
    inputs: dict[str, Any] = {
        "input_ids": batch.token_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    if batch.layout is not None:
        inputs["packing"] = batch.layout
        # Of four dimensions, so that transformers makes none of its own. Nothing reads it: a packed
        # row's layout says who sees whom.
        inputs["attention_mask"] = torch.ones(
            1, 1, 1, 1, dtype=torch.bool, device=batch.token_ids.device
        )
    return inputs


def body(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its output layer."""
    body = model.base_model
    assert isinstance(body, PreTrainedModel)
    return body


def _noisy_embeddings(model: PreTrainedModel, batch: Batch, alpha: float) -> Tensor:
    """Return embeddings + uniform noise in ±alpha / sqrt(tokens of the sample * hidden size).

    Source: NEFTune, arXiv 2310.05914, section 2.
    """
    embeddings: Tensor = model.get_input_embeddings()(batch.token_ids)
    sizes = (batch.sample_lengths * embeddings.shape[-1]).to(embeddings.dtype)
    noise = torch.empty_like(embeddings).uniform_(-1, 1)
    return embeddings + noise * (alpha / sizes.sqrt())[..., None]


class _HeadLoss(torch.autograd.Function):
    """Cross-entropy of hidden states through a frozen output layer, in chunks of rows.

    loss[t] = -log softmax(h[t] Wᵀ + b)[target[t]]. Its gradient in h, (softmax -
    onehot) W, is formed with the logits at hand, so that nothing of the vocabulary's size is kept.
    Checked against: a loop, in tests/trainer/test_loss.py.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> Tensor:
        rows = max(1, _CHUNK_LOGITS // weight.shape[0])
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            log_probs = F.linear(hidden[chunk], weight, bias).float().log_softmax(dim=1)
            target = targets[chunk, None]
            losses[chunk] = -log_probs.gather(1, target).squeeze(1)
            if grad_hidden is not None:
                # In place: softmax - onehot.
                grad_logits = log_probs.exp_()
                grad_logits.scatter_add_(1, target, grad_logits.new_full(target.shape, -1.0))
                grad_hidden[chunk] = grad_logits.to(weight.dtype) @ weight
        ctx.grad_hidden = grad_hidden
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad: Tensor = ctx.grad_hidden
        return grad * gradients[0][:, None].to(grad.dtype), None, None, None
