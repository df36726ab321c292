"""ReplayedSteps: a model's steps, of decoding and with short prompts, replayed if they can be.

Import this module only in a worker that runs: see rora_serve.engine.replay.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from rora_serve.engine.attention_backend import Attending, DecodeImpl, DecodeMetadata
from rora_serve.engine.decoding import DecodeStep
from rora_serve.engine.ragged_batch import RaggedBatch
from rora_serve.engine.recording import NotRecordableError, record
from rora_serve.engine.replay import Attend, Plan
from rora_serve.engine.threads import Threads

_SEQ_TOKENS = 2  # of each, so that scores matter
# Of the largest number: roundings of operators that a replayed step has in another order.
_TOLERANCE = 1e-4


class ReplayedSteps:
    """Stands in front of a model, and replays its steps.

    Args:
        model: vLLM's, whose `forward` is replaced.
        batch: the rows of steps.
        max_rows: tokens of a step that is replayed.

    Larger ones are the model's own, and so are all until a rehearsal has recorded a step and shown
    that replayed ones give what the model gives. One that has one new token of each sequence is
    replayed whole; of others attention is vLLM's, and what is between.
    """

    def __init__(self, model: nn.Module, batch: RaggedBatch, *, max_rows: int) -> None:
        self._model: Any = model
        self._batch = batch
        self._max_rows = max_rows
        self._threads = Threads(torch.get_num_threads())
        self._plan: Plan | None = None
        self._attending: list[Attending] = []
        # Why steps are not replayed, in words for whoever starts a server; "" where they are.
        self.problem = "no step of decoding was rehearsed"
        self._num_blocks = 0
        self._forward = self._model.forward
        self._model.forward = self.forward

    @contextmanager
    def rehearsal(self, num_blocks: int) -> Iterator[None]:
        """Surround a step of decoding that touches every layer, of which a plan is made.

        And steps with prompts after it, by which it is tried.

        Args: num_blocks: of the KV cache, in which nothing is kept yet.
        """
        self._num_blocks = num_blocks
        try:
            yield
        finally:
            self._num_blocks = 0

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """Return hidden states, as the model does; arguments are vLLM's."""
        metadata = None
        if intermediate_tensors is None and not more and positions.dim() == 1:
            metadata = _metadata()
        if metadata is not None and self._num_blocks:
            self._rehearse(metadata, input_ids, inputs_embeds, positions)
        plan = self._plan
        if (
            plan is None
            or metadata is None
            or not len(positions) == metadata.num_actual_tokens <= plan.max_rows
        ):
            return self._forward(input_ids, positions, intermediate_tensors, inputs_embeds, **more)
        if inputs_embeds is None:
            inputs_embeds = self._model.embed_input_ids(input_ids)
        tables = self._batch.tokens.tables
        if metadata.decode is not None:
            return plan.run(inputs_embeds, positions, metadata.decode, tables)
        return plan.run_between(inputs_embeds, positions, self._told(metadata), tables)

    def _told(self, metadata: DecodeMetadata) -> Attend:
        """Return what attends in a step that layers are told so of."""

        def attend(
            layer: int, query: Tensor, new: tuple[Tensor, Tensor] | None, output: Tensor
        ) -> None:
            self._attending[layer].attend(query, new, output, metadata)

        return attend

    def _rehearse(
        self,
        metadata: DecodeMetadata,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        positions: Tensor,
    ) -> None:
        """Record a step of decoding, or try another one by what was recorded.

        A plan is kept if it gives what the model gives.
        """
        try:
            hidden = (
                self._model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            )
            if metadata.decode is not None:
                self._plan = self._new_plan(metadata, metadata.decode, hidden, positions)
                self.problem = ""
            elif self._plan is not None:
                self._try_prompts(self._plan, metadata, positions)
        except NotRecordableError as error:
            self._plan, self.problem = None, str(error)
        except Exception as error:
            # What other models do with tensors that mean nothing is not known; without a plan they
            # are served as before.
            self._plan, self.problem = None, f"{type(error).__name__}: {error}"

    def _new_plan(
        self, metadata: DecodeMetadata, step: DecodeStep, hidden: Tensor, positions: Tensor
    ) -> Plan:
        """Record a step and try it. Raises: NotRecordableError: it can not be replayed."""
        if step.num_seqs >= self._num_blocks:
            raise NotRecordableError(
                f"the KV cache has {self._num_blocks} blocks, more than {step.num_seqs} are "
                "needed to try it"
            )
        # Whatever is done once is done now. Sums are written to what layers get.
        self._forward(None, positions, None, hidden.clone())
        shapes = [
            ((self._max_rows, hidden.shape[1]), hidden.dtype),
            ((self._max_rows,), torch.int64),
        ]
        with DecodeImpl.noting() as self._attending:
            recording = record(
                lambda hidden, positions: self._forward(None, positions, None, hidden),
                shapes,
                self._threads,
            )
        plan = Plan(recording, self._threads)
        if len(self._attending) != plan.num_attending:
            raise NotRecordableError("a layer attends past vLLM's backend")
        if not plan.has_deltas:
            raise NotRecordableError("no layer that adapters change was called")
        self._try(plan, step.num_seqs, metadata, step.block_size)
        self._batch.clear()  # fewer rows, of the base
        self._try(plan, (step.num_seqs + 1) // 2, metadata, step.block_size)
        return plan

    def _try(self, plan: Plan, num_seqs: int, metadata: DecodeMetadata, block_size: int) -> None:
        """Make a step both ways, of random numbers, each sequence in a block of its own.

        Raises: NotRecordableError: results differ.
        """
        generator = torch.Generator().manual_seed(num_seqs)
        hidden = torch.randn(num_seqs, plan.hidden_size, generator=generator)
        positions = torch.arange(num_seqs)
        blocks = torch.arange(1, num_seqs + 1)
        step = DecodeStep(
            torch.full((num_seqs,), _SEQ_TOKENS, dtype=torch.int32),
            blocks.int().view(-1, 1),
            blocks * block_size + _SEQ_TOKENS - 1,
            block_size,
        )
        tables = self._batch.tokens.tables
        kept, metadata.decode = metadata.decode, step
        try:
            expected = self._forward(None, positions, None, hidden.clone())
            found = plan.run(hidden, positions, step, tables)
            _check(found, expected, f"a replayed step of {num_seqs} sequences")
        finally:
            metadata.decode = kept

    def _try_prompts(self, plan: Plan, metadata: DecodeMetadata, positions: Tensor) -> None:
        """Make a step with a prompt in it both ways, of random numbers.

        Raises: NotRecordableError: results differ.
        """
        generator = torch.Generator().manual_seed(len(positions))
        hidden = torch.randn(len(positions), plan.hidden_size, generator=generator)
        expected = self._forward(None, positions, None, hidden.clone())
        tables = self._batch.tokens.tables
        found = plan.run_between(hidden, positions, self._told(metadata), tables)
        _check(found, expected, f"a replayed step with prompts, of {len(positions)} tokens,")


def _check(found: Tensor, expected: Tensor, what: str) -> None:
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= _TOLERANCE:
        raise NotRecordableError(f"{what} is off by {difference:.1e}")


def _metadata() -> DecodeMetadata | None:
    """Return what all layers of a step are told about it; None where they are told otherwise."""
    by_layer = get_forward_context().attn_metadata
    if not isinstance(by_layer, dict):
        return None
    first = next(iter(by_layer.values()), None)
    return first if isinstance(first, DecodeMetadata) else None
