"""Cross-entropy of the tokens that carry loss, without the logits of the others."""

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trainer.batching import IGNORED_LABEL, Batch


def token_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the loss of every position that predicts a token with loss, and where these are.

    Args: batch: on any device.
    Returns: losses [num_samples, num_positions], float32, 0 where a position carries no loss; and
        has_loss [num_samples, num_positions], bool. Only columns with a loss in some sample are
        kept.
    """
    device = model.device
    # Position t predicts token t + 1.
    labels = F.pad(batch.labels[:, 1:], (0, 1), value=IGNORED_LABEL).to(device)
    columns = (labels != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
    labels = labels[:, columns]
    inputs = {
        "input_ids": batch.token_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
        "use_cache": False,
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses, labels != IGNORED_LABEL


def mean_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return the mean loss of a batch's tokens with loss, float32, with its graph."""
    losses, has_loss = token_losses(model, batch)
    return losses.sum() / has_loss.sum()


@torch.no_grad()
def sample_losses(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return each sample's summed loss, float64, and count of tokens with loss, [num_samples]."""
    losses, has_loss = token_losses(model, batch)
    return losses.double().sum(dim=1).cpu(), has_loss.sum(dim=1).cpu()
