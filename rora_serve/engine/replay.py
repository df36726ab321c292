"""Replay: a step of decoding, recorded once, made again by one call on all threads.

A step of SmolLM2-135M is 301 calls of compiled functions, 421 with adapters, and as many times
threads wait for work from Python; a replayed one is a list that every thread goes through by
itself. It holds for any number of rows up to the one that was recorded, since rows lie one after
the other: what is different in a step, its rows, sequences and adapters, is written into all jobs
at once.

Import this module only in a worker that runs: numba must come after vLLM has registered its own
kernels.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
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


class Plan:
    """A step of decoding that was recorded.

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
        self._all = entries
        self._without_deltas = entries[~is_delta]
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

    def run(
        self, hidden: Tensor, positions: Tensor, step: DecodeStep, tables: RowTables | None
    ) -> Tensor:
        """Make a step.

        Args:
            hidden: [num_rows, hidden_size] float32, at most max_rows.
            positions: [num_rows] int64.
            step: the sequences, one a row.
            tables: what adapters do; None: none has rows.
        Returns: [num_rows, hidden_size], valid until the next step.
        """
        num_rows = len(hidden)
        self._hidden[:num_rows] = hidden
        self._positions[:num_rows] = positions
        for column, times in self._rows:
            np.multiply(times, num_rows, out=column)
        if self._sequences is not None:
            lend(self._first_sequences, step)
            numbers = self._sequences.numbers
            numbers[1:, self._step_fields] = numbers[0, self._step_fields]
        entries = self._without_deltas
        if tables is not None and self._deltas is not None:
            entries = self._all
            if tables.number != self._filled_from:
                tables.fill_all(self._deltas.column, self._layers)
                self._filled_from = tables.number
        self._job.entries, self._job.num_entries = entries.ctypes.data, len(entries)
        self._threads.run(_run.address, self._job_address)
        return self._recording.output[:num_rows]
