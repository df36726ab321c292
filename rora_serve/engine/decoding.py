"""DecodeStep and DecodeLayer: a step's sequences, and one layer's attention to them.

Import this module only in a worker that runs: see rora_serve.engine.attention.
"""

import ctypes
import functools
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rora_serve.engine.attention import Job, Workspace
from rora_serve.engine.threads import Threads


class DecodeStep:
    """The sequences of a step that has one new token of each, as the compiled function reads it.

    Args:
        lengths: [num_seqs] int32, tokens of each with the new one.
        table: [num_seqs, blocks or more] int32, where the blocks of each are in the cache.
        slots: [num_seqs] int64, where the new tokens go, below 0 for nowhere.
        block_size: tokens of a block.

    `num_seqs` and `num_blocks` are counts of all; `is_apart` tells whether no sequence reads what
    is put into the cache for another one, as nothing keeps that in order here.
    """

    def __init__(self, lengths: Tensor, table: Tensor, slots: Tensor, block_size: int) -> None:
        counts = -(-lengths.numpy() // block_size)
        self.num_seqs = len(lengths)
        self.block_size = block_size
        self.num_blocks = int(counts.sum())
        self.is_apart = _is_apart(counts, table, slots, block_size)
        self._first_blocks = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._kept = (lengths, table, slots)
        self._fields: Mapping[str, int] = {
            "num_seqs": len(counts),
            "lengths": lengths.data_ptr(),
            "table": table.data_ptr(),
            "table_stride": 4 * table.stride(0),
            "slots": slots.data_ptr(),
            "first_blocks": self._first_blocks.ctypes.data,
        }

    def fill(self, job: Job) -> None:
        """Point a layer's job at these sequences; valid as long as this object lives."""
        for name, value in self._fields.items():
            setattr(job, name, value)


def _is_apart(counts: NDArray[np.int32], table: Tensor, slots: Tensor, block_size: int) -> bool:
    """Tell whether no block that a new token fills up is another sequence's too.

    vLLM's cache of prefixes offers a block from the step on that fills it.
    """
    places = slots.numpy()
    is_last = (places >= 0) & (places % block_size == block_size - 1)
    filled = places[is_last] // block_size
    if not len(filled):
        return True
    blocks = table.numpy()[:, : counts.max()]
    is_used = np.arange(blocks.shape[1]) < counts[:, None]
    return int(np.isin(blocks[is_used], filled).sum()) == len(filled)


@functools.cache
def _workspace(num_threads: int) -> Workspace:
    return Workspace(Threads(num_threads))


def lend(job: Job, step: DecodeStep) -> None:
    """Point a job that has a layer's shape at a step, and at memory to work in; see DecodeLayer."""
    step.fill(job)
    _workspace(torch.get_num_threads()).lend(job, step.num_blocks)


class DecodeLayer:
    """Attention of one new token a sequence, in one layer.

    Args:
        num_heads, num_kv_heads, head_dim: of the layer.
        scale: of scores.
        num_threads: to run on; None: torch's.

    Not for two threads at once, nor to be copied: there is one job, which is named by its address,
    and the memory that it works in is that of all layers.
    Checked against: loops and vLLM's own function, tests/rora_serve/test_attention.py.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        *,
        num_threads: int | None = None,
    ) -> None:
        self._scale = np.array([scale], np.float32)
        self._job = Job(
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            scale=self._scale.ctypes.data,
        )
        self._job_address = ctypes.addressof(self._job)
        self._workspace = _workspace(num_threads or torch.get_num_threads())
        self._cache: Tensor | None = None
        self._step: DecodeStep | None = None
        self._version = 0

    @property
    def has_all_threads(self) -> bool:
        """Whether it runs on as many threads as were asked for."""
        return self._workspace.has_all_threads

    def attend(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor] | None,
        cache: Tensor,
        output: Tensor,
        step: DecodeStep,
    ) -> None:
        """Put new tokens into the cache, and write what every sequence's attention to it is.

        Args:
            query: [num_seqs, num_heads, head_dim] float32.
            new: keys and values of [num_seqs, num_kv_heads, head_dim]; None: they are in the cache.
            cache: [num_blocks, num_kv_heads, block_size, 2 * head_dim]; of a block and a head, all
                keys, [head_dim, block_size], before all values, [block_size, head_dim].
            output: of the shape of query.
        """
        job = self._job
        if cache is not self._cache:
            self._cache = cache
            job.cache, job.block_size = cache.data_ptr(), cache.shape[2]
            job.block_bytes, job.head_bytes = 4 * cache.stride(0), 4 * cache.stride(1)
        if step is not self._step or self._workspace.version != self._version:
            assert step.block_size == job.block_size, "or blocks are counted wrongly"
            self._step = step
            step.fill(job)
            self._workspace.lend(job, step.num_blocks)
            self._version = self._workspace.version
        query = _side_by_side(query)
        written = _side_by_side(output)
        job.query, job.query_stride = query.data_ptr(), 4 * query.stride(0)
        job.output, job.output_stride = written.data_ptr(), 4 * written.stride(0)
        if new is None:
            job.key = 0
        else:
            key, value = map(_side_by_side, new)
            job.key, job.key_stride = key.data_ptr(), 4 * key.stride(0)
            job.value, job.value_stride = value.data_ptr(), 4 * value.stride(0)
        self._workspace.run(self._job_address)
        if written is not output:
            output.copy_(written)


def _side_by_side(heads: Tensor) -> Tensor:
    """Return the same with the heads of each token one after the other, as they mostly are."""
    _, head_stride, stride = heads.stride()
    return heads if stride == 1 and head_stride == heads.shape[2] else heads.contiguous()
