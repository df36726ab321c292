"""vLLM's attention for CPUs, whose steps of decoding are ours.

Prompts, and what else ours has no code for, stay vLLM's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

# numba must come after vLLM has registered its own kernels, which it has by now.
from rora_serve.engine.attention import can_attend
from rora_serve.engine.decoding import DecodeLayer, DecodeStep

# vLLM's name for the layout of the cache that we read: a block's keys as [head_dim, block_size].
_LAYOUT = "vec"


@dataclass
class DecodeMetadata(CPUAttentionMetadata):
    """vLLM's, and the step for our function, if it is one for it."""

    decode: DecodeStep | None = None


_FIELDS = fields(CPUAttentionMetadata)


class DecodeMetadataBuilder(CPUAttentionMetadataBuilder):
    """Tells layers about a step."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert isinstance(self.dtype, torch.dtype), "vLLM has resolved it by now"
        has_code = can_attend(self.dtype, self.head_dim, self.block_size)
        has_as_long_values = getattr(self.kv_cache_spec, "head_size_v", None) == self.head_dim
        self._is_ours = has_code and has_as_long_values and self.isa == _LAYOUT

    def build(self, *arguments: Any, **options: Any) -> DecodeMetadata:
        """Return what vLLM tells, and whether every sequence has one new token."""
        found = super().build(*arguments, **options)
        metadata = DecodeMetadata(**{field.name: getattr(found, field.name) for field in _FIELDS})
        is_decode = found.max_query_len == 1 and len(found.seq_lens) == found.num_actual_tokens
        is_causal = found.causal and found.dynamic_causal is None
        if self._is_ours and is_decode and is_causal and _can_read(found):
            step = DecodeStep(
                found.seq_lens, found.block_table, found.slot_mapping, self.block_size
            )
            metadata.decode = step if step.is_apart else None
        return metadata


def _can_read(found: CPUAttentionMetadata) -> bool:
    """Tell whether tables are as the compiled function, which looks at no dtype, takes them."""
    return (
        found.seq_lens.dtype == found.block_table.dtype == torch.int32
        and found.slot_mapping.dtype == torch.int64
        and found.block_table.stride(1) == 1
    )


class Attending(NamedTuple):
    """One layer's attention, as `DecodeImpl.forward` was asked for it."""

    impl: "DecodeImpl"
    layer: Any
    cache: Tensor

    def attend(
        self, query: Tensor, new: tuple[Tensor, Tensor] | None, output: Tensor, metadata: Any
    ) -> None:
        """Ask it the same of other tokens; tensors as `DecodeImpl.forward`'s."""
        key: Any
        value: Any
        key, value = new or (None, None)
        self.impl.forward(self.layer, query, key, value, self.cache, metadata, output)


class DecodeImpl(CPUAttentionBackendImpl):
    """One layer's attention."""

    _noted: ClassVar[list[Attending] | None] = None

    @staticmethod
    @contextmanager
    def noting() -> Iterator[list[Attending]]:
        """Note which layers attend meanwhile, in order."""
        noted: list[Attending] = []
        DecodeImpl._noted = noted
        try:
            yield noted
        finally:
            DecodeImpl._noted = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        is_plain = (
            self.attn_type == AttentionType.DECODER
            and self.alibi_slopes is None
            and self.sinks is None
            and self.sliding_window == -1
            and self.logits_soft_cap == 0
        )
        ours = DecodeLayer(self.num_heads, self.num_kv_heads, self.head_size, self.scale)
        self._ours = ours if is_plain and ours.has_all_threads else None

    def forward(  # noqa: PLR0913, PLR0917  (vLLM's)
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Put new keys and values into the cache, and attend to it.

        Arguments are vLLM's.
        """
        if attn_metadata is None:  # a warm-up
            return output
        if DecodeImpl._noted is not None:
            DecodeImpl._noted.append(Attending(self, layer, kv_cache))
        # Some layers read what another one puts there.
        is_kept = key is not None and value is not None
        is_new = is_kept and layer.kv_sharing_target_layer_name is None
        step: DecodeStep | None = getattr(attn_metadata, "decode", None)
        is_scaled = output_scale is not None or output_block_scale is not None
        if self._ours is not None and step is not None and not is_scaled:
            new = (key, value) if is_new else None
            self._ours.attend(query, new, kv_cache, output, step)
            return output
        if is_new:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        return super().forward(
            layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
            output_block_scale,
        )  # fmt: skip


class DecodeBackend(CPUAttentionBackend):
    """vLLM's backend, with our steps of decoding."""

    # `forward` puts new keys and values into the cache: ours on the way, with one call less.
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """Return what layers attend with."""
        return DecodeImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """Return what tells them about a step."""
        return DecodeMetadataBuilder
