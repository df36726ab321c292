"""Replay: a step, recorded once, made again by one call on all threads.

A step of SmolLM2-135M is 301 calls of compiled functions, 421 with adapters, and as many times
threads wait for work from Python; a replayed one is a list that every thread goes through by
itself. It holds for any number of rows up to the one that was recorded, since rows lie one after
the other: what is different in a step, its rows, sequences and adapters, is written into all jobs
at once. Of a step with prompts in it attention is somebody else's: there one call makes what is
between two layers' attention.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray, cfunc, types
from numpy.typing import NDArray
from torch import Tensor

from rora_serve.engine import attention, kernels, products
from rora_serve.engine.decoding import DecodeStep, lend
from rora_serve.engine.instructions import (
    CACHE_LINE,
    call_address,
    call_with,
    int64_fields,
    read_int,
    record_of,
    this_thread,
    write_int,
)
from rora_serve.engine.ragged_batch import RowTables
from rora_serve.engine.recording import NotRecordableError, Recording
from rora_serve.engine.threads import Threads

# Attends in one layer, counted in a step's order: puts new keys and values into the cache, if there
# are any, and writes what attention is. [num_rows, heads, head_dim] each.
Attend = Callable[[int, Tensor, tuple[Tensor, Tensor] | None, Tensor], None]

_ENTRY = 3  # numbers: function, job, and counters that are set to 0 after it


class Job(ctypes.Structure):
    """A step. Numbers and addresses, all int64.

    Args:
        entries: address of [num_entries, 3]: a function's address, that of its job, and that of
            counters, one a thread and a cache line apart, to be set to 0 once all threads are done
            with it; 0 for none.
        num_entries: in order.
        thread_num, num_threads, barrier: addresses of OpenMP's functions; 0 for one thread.
    """

    _fields_ = int64_fields("entries", "num_entries", "thread_num", "num_threads", "barrier")


@cfunc(types.void(types.CPointer(record_of(Job))), cache=True, error_model="numpy")
def _run(at: Any) -> None:
    job = carray(at, 1)[0]
    thread, num_threads = this_thread(job)
    for i in range(job.num_entries):
        entry = job.entries + 8 * _ENTRY * i
        call_with(read_int(entry, 0), read_int(entry, 1))
        if num_threads > 1:
            call_address(job.barrier)
        taken = read_int(entry, 2)
        if taken:
            write_int(taken + thread * CACHE_LINE, 0)


class _Jobs:
    """All recorded jobs of a type, as one table.

    Args: kind: of job.
    """

    def __init__(self, kind: type[ctypes.Structure], jobs: list[Any]) -> None:
        self._names = [field[0] for field in kind._fields_]
        shape = (len(jobs), len(self._names))
        self.numbers = np.frombuffer(b"".join(map(bytes, jobs)), np.int64).reshape(shape).copy()

    def column(self, name: str) -> NDArray[np.int64]:
        """Return a field of all jobs, to be read or written."""
        return self.numbers[:, self._names.index(name)]

    def indices(self, names: Sequence[str]) -> list[int]:
        """Return where fields are in `numbers`."""
        return [self._names.index(name) for name in names]

    def has(self, name: str) -> bool:
        """Tell whether jobs have a field."""
        return name in self._names


class _Entries:
    """Calls in order, and where attention is among them."""

    def __init__(self, entries: NDArray[np.int64], is_attention: NDArray[np.bool_]) -> None:
        self.address, self.count = entries.ctypes.data, len(entries)
        self._kept = entries
        self.attention = np.flatnonzero(is_attention).tolist()


class _Heads(NamedTuple):
    """What a layer's attention reads and writes, of as many rows as were recorded."""

    query: Tensor
    new: tuple[Tensor, Tensor] | None
    output: Tensor


class Plan:
    """A step of decoding that was recorded, to be made again with other tokens.

    Args:
        recording: of a model, given hidden states, [max_rows, hidden_size], and positions,
            [max_rows].
        threads: to run on.
    Raises: NotRecordableError: what was recorded is not the same for every number of rows.
    """

    def __init__(self, recording: Recording, threads: Threads) -> None:
        self._recording = recording
        self._hidden, self._positions = recording.inputs
        self.max_rows, self.hidden_size = self._hidden.shape
        kinds = list(dict.fromkeys(type(call.job) for call in recording.calls))
        tables = {
            kind: _Jobs(kind, [call.job for call in recording.calls if type(call.job) is kind])
            for kind in kinds
        }
        self._sequences = tables.get(attention.Job)
        self._deltas = tables.get(kernels.Job)
        self._rows = [
            (table.column("num_rows"), self._rows_of_each(table))
            for table in tables.values()
            if table.has("num_rows")
        ]
        entries = np.zeros((len(recording.calls), _ENTRY), np.int64)
        places = {kind: iter(table.numbers) for kind, table in tables.items()}
        for entry, call in zip(entries, recording.calls, strict=True):
            entry[:2] = call.function, next(places[type(call.job)]).ctypes.data
        is_product = [type(call.job) is products.Job for call in recording.calls]
        if any(is_product):
            # Not those of layers that are called one by one, who set them to 0 before. Nor the same
            # for all: a thread sets its own to 0 while others may be in the next product.
            self._taken = np.zeros((sum(is_product), threads.count, CACHE_LINE // 8), np.int64)
            taken = self._taken.ctypes.data + np.arange(sum(is_product)) * self._taken.strides[0]
            tables[products.Job].column("taken")[:] = taken
            entries[is_product, 2] = taken
        is_delta = np.array([type(call.job) is kernels.Job for call in recording.calls], bool)
        is_attention = np.array([type(call.job) is attention.Job for call in recording.calls], bool)
        self._all = _Entries(entries, is_attention)
        self._without_deltas = _Entries(entries[~is_delta], is_attention[~is_delta])
        attending = [call.job for call in recording.calls if type(call.job) is attention.Job]
        self._heads = [_heads_of(job, self.max_rows) for job in attending]
        self.has_deltas = self._deltas is not None
        if self._deltas is not None:
            self._layers = self._deltas.column("layer").copy()
        self._tables = tables
        self._threads = threads
        self._job = Job(
            thread_num=threads.thread_num,
            num_threads=threads.num_threads,
            barrier=threads.barrier,
        )
        self._job_address = ctypes.addressof(self._job)
        if self._sequences is not None:
            self._step_fields = self._sequences.indices(attention.STEP_FIELDS)
            self._first_sequences = attention.Job.from_buffer(self._sequences.numbers[0])
            same = ("head_dim", "num_kv_heads", "group", "block_size")
            if any(len(set(self._sequences.column(name).tolist())) > 1 for name in same):
                raise NotRecordableError("layers' heads are of several shapes")
        self._filled_from = 0

    def _rows_of_each(self, table: _Jobs) -> NDArray[np.int64]:
        """Return how many rows a job has for each of the step's, as norms of heads have several."""
        times, rest = np.divmod(table.column("num_rows"), self.max_rows)
        if rest.any():
            raise NotRecordableError(f"{int(rest.max())} rows for {self.max_rows} of the step")
        return times

    @property
    def num_attending(self) -> int:
        """Layers that attend."""
        return len(self._heads)

    def run(
        self, hidden: Tensor, positions: Tensor, step: DecodeStep, tables: RowTables | None
    ) -> Tensor:
        """Make a step of decoding.

        Args:
            hidden: [num_rows, hidden_size] float32, at most max_rows.
            positions: [num_rows] int64.
            step: the sequences, one a row.
            tables: what adapters do; None: none has rows.
        Returns: [num_rows, hidden_size], valid until the next step.
        """
        entries = self._begin(hidden, positions, tables)
        if self._sequences is not None:
            lend(self._first_sequences, step)
            numbers = self._sequences.numbers
            numbers[1:, self._step_fields] = numbers[0, self._step_fields]
        self._call(entries, 0, entries.count)
        return self._recording.output[: len(hidden)]

    def run_between(
        self, hidden: Tensor, positions: Tensor, attend: Attend, tables: RowTables | None
    ) -> Tensor:
        """Make a step of any tokens, whose attention is `attend`'s; the rest is as `run`'s."""
        entries = self._begin(hidden, positions, tables)
        num_rows, first = len(hidden), 0
        for layer, ((query, new, output), at) in enumerate(
            zip(self._heads, entries.attention, strict=True)
        ):
            self._call(entries, first, at)
            keys_values = new and (new[0][:num_rows], new[1][:num_rows])
            attend(layer, query[:num_rows], keys_values, output[:num_rows])
            first = at + 1
        self._call(entries, first, entries.count)
        return self._recording.output[:num_rows]

    def _begin(self, hidden: Tensor, positions: Tensor, tables: RowTables | None) -> _Entries:
        """Write rows and adapters into all jobs; return the calls to be made."""
        num_rows = len(hidden)
        self._hidden[:num_rows] = hidden
        self._positions[:num_rows] = positions
        for column, times in self._rows:
            np.multiply(times, num_rows, out=column)
        if tables is None or self._deltas is None:
            return self._without_deltas
        if tables.number != self._filled_from:
            tables.fill_all(self._deltas.column, self._layers)
            self._filled_from = tables.number
        return self._all

    def _call(self, entries: _Entries, first: int, last: int) -> None:
        self._job.entries = entries.address + 8 * _ENTRY * first
        self._job.num_entries = last - first
        self._threads.run(_run.address, self._job_address)


def _heads_of(job: Any, num_rows: int) -> _Heads:
    def heads(address: int, row_bytes: int, count: int) -> Tensor:
        width = count * job.head_dim
        length = (num_rows - 1) * row_bytes // 4 + width
        numbers = torch.frombuffer(
            (ctypes.c_float * length).from_address(address), dtype=torch.float32
        )
        return numbers.as_strided(
            (num_rows, count, job.head_dim), (row_bytes // 4, job.head_dim, 1)
        )

    num_heads = job.num_kv_heads * job.group
    new = None
    if job.key:
        key = heads(job.key, job.key_stride, job.num_kv_heads)
        new = key, heads(job.value, job.value_stride, job.num_kv_heads)
    query = heads(job.query, job.query_stride, num_heads)
    return _Heads(query, new, heads(job.output, job.output_stride, num_heads))
