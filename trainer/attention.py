"""Attention of a packed batch: samples in one row, each seeing itself and the prefix they share.

Registered with transformers' attention interface under `PACKED`; the layout of the row travels to
each layer as the keyword argument `packing` of the model's forward. Without one it is transformers'
own attention with its own masks, so that a model that was switched over still computes all else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "rora_packed"
# Samples are padded for attention alone, in groups whose shortest is at least this share of the
# longest: padding costs attention, every group costs a call in every layer.
_SHORTEST_OF_LONGEST = 0.6
# Arguments that transformers' models pass when their attention is not plain causal softmax.
_OTHER_ATTENTION = ("softcap", "s_aux", "position_bias", "cache")


class PackingError(Exception):
    """The model can not take packed batches, for the reason given."""


@dataclass(frozen=True)
class AttentionGroup:
    """Samples of similar length, one after the other in the row, that one attention call covers.

    Args:
        start, stop: where the group's tokens lie in the row.
        num_samples: of the group; longest: tokens of its longest.
        places: [stop - start], int64: of each token in the padded [num_samples * longest]; None if
            all samples are equally long, so that nothing is padded.
        mask: [longest, num_prefix + longest], bool: what a query may see; None: plain causal.
    """

    start: int
    stop: int
    num_samples: int
    longest: int
    places: Tensor | None
    mask: Tensor | None

    def pad(self, rows: Tensor) -> Tensor:
        """[num_rows, num_tokens, heads, head_dim] -> [num_rows, num_samples, longest, ...]."""
        tokens = rows[:, self.start : self.stop]
        if self.places is not None:
            size = (len(rows), self.num_samples * self.longest, *tokens.shape[2:])
            tokens = tokens.new_zeros(size).index_copy(1, self.places, tokens)
        return tokens.view(len(rows), self.num_samples, self.longest, *tokens.shape[2:])

    def unpad(self, padded: Tensor) -> Tensor:
        """[num_rows, num_samples, longest, ...] -> [num_rows, stop - start, ...]."""
        tokens = padded.flatten(1, 2)
        return tokens if self.places is None else tokens.index_select(1, self.places)


@dataclass(frozen=True)
class PackedLayout:
    """Where the shared prefix and the samples lie in one row of tokens.

    Args:
        num_prefix: tokens at the row's start that every sample continues.
        groups: the samples after the prefix, in the row's order.
        longest: tokens of the longest sample, prefix included.
    """

    num_prefix: int
    groups: tuple[AttentionGroup, ...]
    longest: int

    def attended(self) -> None:
        """Hear that a layer's attention uses this layout."""


def lay_out(num_prefix: int, lengths: Sequence[int], device: torch.device) -> PackedLayout:
    """Return the layout of samples that follow a prefix one after the other.

    Args: lengths: of the samples without the prefix, at least 1 each, the longest first.
    """
    groups = []
    start, first = num_prefix, 0
    while first < len(lengths):
        longest = lengths[first]
        sizes = [size for size in lengths[first:] if size >= _SHORTEST_OF_LONGEST * longest]
        places = None
        if sizes[-1] < longest:
            places = torch.cat([torch.arange(size) + n * longest for n, size in enumerate(sizes)])
        mask = None
        if num_prefix:
            last_visible = torch.arange(longest) + num_prefix
            mask = torch.arange(num_prefix + longest) <= last_visible[:, None]
        groups.append(
            AttentionGroup(
                start,
                start + sum(sizes),
                len(sizes),
                longest,
                None if places is None else places.to(device),
                None if mask is None else mask.to(device),
            )
        )
        start, first = start + sum(sizes), first + len(sizes)
    return PackedLayout(num_prefix, tuple(groups), longest=num_prefix + max(lengths))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    packing: PackedLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Return what each sample's own causal attention gives, the prefix computed once.

    Args:
        query: [num_rows, num_heads, num_tokens, head_dim]; key, value: [.., num_kv_heads, ..].
        attention_mask: counts only without a layout.
        packing: the layout of every row.
        others: settings of models whose attention is of another kind; refused if they are set.
            sliding_window, how far back a token sees, may be set if it takes in every sample.
    Returns: [num_rows, num_tokens, num_heads, head_dim], new, and no attention weights.
    Raises: PackingError: the model's attention is of another kind, or looks back less far than a
        sample is long.
    """
    if packing is None:
        attended: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return attended
    packing.attended()
    sliding_window = others.get("sliding_window")
    if sliding_window is not None and sliding_window < packing.longest:
        raise PackingError(
            f"its attention looks back {sliding_window} tokens, the longest sample has "
            f"{packing.longest}"
        )
    refused = [name for name in _OTHER_ATTENTION if others.get(name) is not None]
    if refused:
        raise PackingError(f"its attention uses {', '.join(refused)}")

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """[num_rows, num_samples, num_tokens, heads, head_dim] in and out."""
        attended = F.scaled_dot_product_attention(
            q.flatten(0, 1).transpose(1, 2),
            k.flatten(0, 1).transpose(1, 2),
            v.flatten(0, 1).transpose(1, 2),
            attn_mask=mask,
            dropout_p=dropout if module.training else 0.0,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).reshape(q.shape)

    # [num_rows, num_tokens, heads, head_dim]: a token's heads lie together, as the projections
    # wrote them. On CPUs torch's attention takes four times as long in bfloat16 as in float32.
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    q, k, v = (tensor.transpose(1, 2).to(dtype) for tensor in (query, key, value))
    num_prefix = packing.num_prefix
    shared_k, shared_v = k[:, None, :num_prefix], v[:, None, :num_prefix]
    parts = []
    if num_prefix:
        parts.append(attend(q[:, None, :num_prefix], shared_k, shared_v, None)[:, 0])
    for group in packing.groups:
        size = (-1, group.num_samples, -1, -1, -1)
        own_k = torch.cat([shared_k.expand(size), group.pad(k)], dim=2)
        own_v = torch.cat([shared_v.expand(size), group.pad(v)], dim=2)
        parts.append(group.unpad(attend(group.pad(q), own_k, own_v, group.mask)))
    return torch.cat(parts, dim=1).to(query.dtype), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
