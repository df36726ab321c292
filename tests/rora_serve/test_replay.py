"""A replayed step gives what its layers give one by one, and nothing is left out of it."""

import importlib
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm._custom_ops  # noqa: F401  (loads vLLM's library)
from torch import Tensor

from rora_serve.engine.ragged_batch import RaggedBatch
from rora_serve.engine.ragged_layers import DeltasAfterProduct, RaggedLayer
from rora_serve.engine.slots import Element, Slot
from rora_serve.engine.threads import Threads
from tests.rora_serve.older_processor import run_compiled_for_avx2
from tests.rora_serve.slots import make_slot

# As rora_serve.engine.worker does: numba must come after vLLM.
activations = importlib.import_module("rora_serve.engine.activations")
decoding = importlib.import_module("rora_serve.engine.decoding")
instructions = importlib.import_module("rora_serve.engine.instructions")
kernels = importlib.import_module("rora_serve.engine.kernels")
products = importlib.import_module("rora_serve.engine.products")
recording = importlib.import_module("rora_serve.engine.recording")
replay = importlib.import_module("rora_serve.engine.replay")

if platform.machine() != "x86_64":
    pytest.skip("other processors replay nothing", allow_module_level=True)

OPS: Any = torch.ops
HIDDEN, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, INNER = 48, 32, 4, 2, 80
QKV = (NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM)
NUM_LAYERS, MAX_ROWS, NUM_BLOCKS, BLOCK_SIZE = 3, 11, 40, 16
ATOL = 1e-4  # of numbers of about 10, through three layers
SHAPES = (((MAX_ROWS, HIDDEN), torch.float32), ((MAX_ROWS,), torch.int64))


@pytest.fixture(autouse=True)
def as_in_a_worker() -> Iterator[None]:
    """vLLM runs its models so, and a recording sees other operators then."""
    with torch.inference_mode():
        yield


class Model:
    """Layers of a Llama with adapters, norms of heads as Qwen3's, and one bias.

    `step` is what vLLM tells layers of a step, `batch` whose rows are whose.
    """

    def __init__(self, num_threads: int = 2, *, extra: Callable[[Tensor], Any] | None = None):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.threads = Threads(num_threads)
        self.step: Any = None
        self.extra: Callable[[Tensor], Any] | None = None
        self.table = randn(50, HEAD_DIM)
        self.bias = randn(sum(QKV))
        self.norms = randn(2 * NUM_LAYERS + 1, HIDDEN)
        self.head_norm = randn(HEAD_DIM)
        self.caches = [
            randn(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM) for _ in range(NUM_LAYERS)
        ]
        sizes = [
            (HIDDEN, QKV), (QKV[0], (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,)),
        ] * NUM_LAYERS  # fmt: skip
        self.batch = RaggedBatch(len(sizes))
        loop = kernels.Loop(Element.F32, self.threads)
        self.sizes = sizes
        self.products = []
        for index, (width, parts) in enumerate(sizes):
            product = products.Product(randn(sum(parts), width) / width**0.5, self.threads)
            starts = [sum(parts[:part]) for part in range(len(parts))]
            columns = tuple(zip(starts, parts, strict=True))
            layer = RaggedLayer(
                str(index), index, "linear", in_features=width, parts=columns, loop=loop
            )
            product.add(DeltasAfterProduct(layer, self.batch))
            self.products.append(product)
        self.activation = activations.Activation(self.threads)
        self.attention: list[Any] = [
            decoding.DecodeLayer(NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, 0.3) for _ in range(NUM_LAYERS)
        ]
        # What is done once, such as copying weights, is done before a step is recorded.
        self.step = new_step([3])
        self(torch.randn(1, HIDDEN), torch.zeros(1, dtype=torch.int64))
        self.extra = extra

    def __call__(self, hidden: Tensor, positions: Tensor) -> Tensor:
        residual = None
        for layer in range(NUM_LAYERS):
            hidden, residual = self._normed(hidden, residual, self.norms[2 * layer])
            hidden = self._attended(layer, hidden, positions)
            hidden, residual = self._normed(hidden, residual, self.norms[2 * layer + 1])
            gate_up, down = self.products[4 * layer + 2 : 4 * layer + 4]
            inner = self.activation(gate_up(hidden, None, None))
            assert inner is not None
            hidden = down(inner, None, None)
            if self.extra is not None:
                self.extra(hidden)
        return self._normed(hidden, residual, self.norms[-1])[0]

    def _normed(self, x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        if residual is None:
            y = torch.empty_like(x)
            OPS._C.rms_norm(y, x, weight, 1e-5)
            return y, x
        OPS._C.fused_add_rms_norm(x, residual, weight, 1e-5)
        return x, residual

    def _attended(self, layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
        qkv, o = self.products[4 * layer : 4 * layer + 2]
        query, key, value = qkv(hidden, None, self.bias).split(QKV, dim=-1)
        normed = torch.empty(len(hidden), NUM_HEADS, HEAD_DIM)
        heads = query.view(-1, NUM_HEADS, HEAD_DIM).contiguous()
        OPS._C.rms_norm(normed, heads, self.head_norm, 1e-5)
        query = normed.view(len(hidden), -1)
        OPS._C.rotary_embedding(positions, query, key, HEAD_DIM, self.table, True)
        output = torch.empty(len(hidden), NUM_HEADS, HEAD_DIM)
        self.attention[layer].attend(
            query.view(output.shape),
            tuple(new.view(-1, NUM_KV_HEADS, HEAD_DIM) for new in (key, value)),
            self.caches[layer],
            output,
            self.step,
        )
        found: Tensor = o(output.view(len(hidden), -1), None, None)
        return found

    def slot(self, seed: int) -> Slot:
        """An adapter of random ranks, that leaves out some modules."""
        generator = np.random.default_rng(seed)
        factors = {}
        for index, (width, parts) in enumerate(self.sizes):
            for part, size in enumerate(parts):
                rank = int(generator.integers(1, 20))
                if rank < 15:
                    a = generator.normal(size=(rank, width)).astype(np.float32)
                    b = generator.normal(size=(size, rank)).astype(np.float32) / 10
                    factors[index, part] = a, b, 0.3
        return make_slot(factors, num_layers=len(self.sizes), num_parts=3)

    def slot_of_all(self) -> Slot:
        """An adapter that touches all layers, as the one of a rehearsal does."""
        factors = {
            (index, 0): (np.ones((1, w), np.float32), np.ones((p[0], 1), np.float32), 1.0)
            for index, (w, p) in enumerate(self.sizes)
        }
        return make_slot(factors, num_layers=len(self.sizes), num_parts=3)

    def plan(self) -> Any:
        """As a rehearsal makes one."""
        self.batch.set_rows([1], [1], {1: self.slot_of_all()})
        found = recording.record(self, SHAPES, self.threads)
        return replay.Plan(found, self.threads)


def new_step(lengths: list[int]) -> Any:
    """Sequences in blocks of their own."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    slots, at = [], 0
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = torch.arange(at, at + count)
        at += count
        slots.append((at - 1) * BLOCK_SIZE + (length - 1) % BLOCK_SIZE)
    return decoding.DecodeStep(
        torch.tensor(lengths, dtype=torch.int32), table, torch.tensor(slots), BLOCK_SIZE
    )


@pytest.mark.parametrize("num_threads", [1, 2])
def test_replayed_steps_are_those_of_the_layers(num_threads: int) -> None:
    """Of any number of rows and adapters, in any order, and with layers one by one between."""
    model = Model(num_threads)
    plan = model.plan()
    slots = {key: model.slot(key) for key in (1, 2, 3)}
    generator = torch.Generator().manual_seed(1)
    chooser = np.random.default_rng(2)
    for lengths in ([1], [17, 2], [5] * MAX_ROWS, [1, 40, 16], [33] * 7, [2]):
        for adapters in ([0], [1], [1, 2, 3], [0, 2]):
            num_rows = len(lengths)
            hidden = torch.randn(num_rows, HIDDEN, generator=generator)
            positions = torch.randint(0, 50, (num_rows,), generator=generator)
            rows = chooser.choice(adapters, num_rows).tolist()
            model.batch.set_rows(rows, rows, slots)
            model.step = new_step(lengths)
            caches = [cache.clone() for cache in model.caches]
            found = plan.run(hidden, positions, model.step, model.batch.tokens.tables).clone()
            of_plan = [cache.clone() for cache in model.caches]
            for cache, before in zip(model.caches, caches, strict=True):
                cache.copy_(before)
            expected = model(hidden.clone(), positions)
            torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)
            for cache, other in zip(model.caches, of_plan, strict=True):
                torch.testing.assert_close(cache, other, atol=ATOL, rtol=ATOL)
            again = plan.run(hidden, positions, model.step, model.batch.tokens.tables)
            assert torch.equal(found, again), "a step is the same each time"


class TokenByToken:
    """Attends as a loop of steps of one token."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def attend(
        self,
        query: Tensor,
        new: tuple[Tensor, Tensor],
        cache: Tensor,
        output: Tensor,
        steps: list[Any],
    ) -> None:
        for row, step in enumerate(steps):
            one = slice(row, row + 1)
            self._layer.attend(query[one], (new[0][one], new[1][one]), cache, output[one], step)


def token_by_token(lengths: list[tuple[int, int]]) -> list[Any]:
    """Steps of one token for sequences of so many tokens before, and of so many new ones."""
    steps = []
    for row, (before, new) in enumerate(lengths):
        blocks = torch.tensor([[2 * row, 2 * row + 1]], dtype=torch.int32)
        for at in range(before, before + new):
            length = torch.tensor([at + 1], dtype=torch.int32)
            slot = torch.tensor([2 * row * BLOCK_SIZE + at])
            steps.append(decoding.DecodeStep(length, blocks, slot, BLOCK_SIZE))
    return steps


def test_layers_that_put_nothing_into_the_cache_are_asked_without_keys() -> None:
    """As those that read another layer's."""
    model = Model()
    cache = model.caches[0]
    kept: list[Any] = []

    def reading(x: Tensor, _: Tensor) -> Tensor:
        query = x[:, :32].contiguous().view(-1, 1, HEAD_DIM)
        output = torch.empty(len(x), 1, HEAD_DIM)
        one = decoding.DecodeLayer(1, 1, HEAD_DIM, 0.3)
        one.attend(query, None, cache[:, :1], output, model.step)
        kept.append(one)
        return output.view(-1, HEAD_DIM)

    plan = replay.Plan(recording.record(reading, SHAPES, model.threads), model.threads)
    asked = []

    def attend(number: int, query: Tensor, new: Any, output: Tensor) -> None:
        asked.append((number, new))
        torch.mul(query, 2, out=output)

    x = torch.randn(5, HIDDEN)
    found = plan.run_between(x, torch.arange(5), attend, None)
    assert torch.equal(found, 2 * x[:, :32])
    assert asked == [(0, None)]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_steps_with_prompts_are_those_of_the_layers_but_for_attention(num_threads: int) -> None:
    model = Model(num_threads)
    plan = model.plan()
    assert plan.num_attending == NUM_LAYERS
    slots = {key: model.slot(key) for key in (1, 2)}
    layers = model.attention = [TokenByToken(layer) for layer in model.attention]
    generator = torch.Generator().manual_seed(1)
    for lengths, adapters in (
        ([(0, 7)], [1]),
        ([(0, 5), (20, 1), (14, 4), (3, 1)], [1, 0, 2, 2]),
        ([(0, 3), (9, 1)], [0, 0]),
        ([(0, MAX_ROWS)], [2]),
    ):
        rows = [key for (_, new), key in zip(lengths, adapters, strict=True) for _ in range(new)]
        steps = model.step = token_by_token(lengths)
        model.batch.set_rows(rows, rows, slots)
        hidden = torch.randn(len(rows), HIDDEN, generator=generator)
        positions = torch.randint(0, 50, (len(rows),), generator=generator)

        def attend(
            layer: int, query: Tensor, new: Any, output: Tensor, *, steps: Any = steps
        ) -> None:
            layers[layer].attend(query, new, model.caches[layer], output, steps)

        caches = [cache.clone() for cache in model.caches]
        expected = model(hidden.clone(), positions)
        of_layers = [cache.clone() for cache in model.caches]
        for cache, before in zip(model.caches, caches, strict=True):
            cache.copy_(before)
        found = plan.run_between(hidden, positions, attend, model.batch.tokens.tables)
        torch.testing.assert_close(found, expected, atol=ATOL, rtol=ATOL)
        for cache, other in zip(model.caches, of_layers, strict=True):
            torch.testing.assert_close(cache, other, atol=ATOL, rtol=ATOL)


def test_a_row_is_the_same_alone_and_beside_others() -> None:
    model = Model()
    plan = model.plan()
    slots = {1: model.slot(1), 2: model.slot(2)}
    hidden, positions = torch.randn(5, HIDDEN), torch.arange(5)
    rows = [1, 0, 2, 1, 2]
    model.batch.set_rows(rows, rows, slots)
    together = plan.run(hidden, positions, new_step([3] * 5), model.batch.tokens.tables).clone()
    for row, adapter in enumerate(rows):
        model.batch.set_rows([adapter], [adapter], slots)
        tables = model.batch.tokens.tables
        blocks = torch.full((1, 1), row, dtype=torch.int32)
        lengths, at = torch.tensor([3], dtype=torch.int32), torch.tensor([row * BLOCK_SIZE + 2])
        step = decoding.DecodeStep(lengths, blocks, at, BLOCK_SIZE)
        alone = plan.run(hidden[row : row + 1], positions[row : row + 1], step, tables)
        if adapter:  # groups of other sizes are added up in another order
            torch.testing.assert_close(alone[0], together[row], atol=ATOL, rtol=ATOL)
        else:
            assert torch.equal(alone[0], together[row])


def test_a_step_costs_its_own_rows_alone() -> None:
    model = Model()
    plan = model.plan()
    model.batch.set_rows([1] * 3, [1] * 3, {1: model.slot(1)})
    output = plan._recording.output
    output.fill_(torch.nan)
    plan.run(torch.randn(3, HIDDEN), torch.arange(3), new_step([2] * 3), model.batch.tokens.tables)
    assert not output[:3].isnan().any()
    assert output[3:].isnan().all()


def test_rows_that_lie_apart_are_copied() -> None:
    """Whichever way a model asks for rows one after the other."""
    threads = Threads(2)

    def laid_out(x: Tensor, _: Tensor) -> Tensor:
        copied = x[:, 5:37].contiguous()
        return copied[:, 3:19].clone(memory_format=torch.contiguous_format)

    plan = replay.Plan(recording.record(laid_out, SHAPES, threads), threads)
    x = torch.randn(MAX_ROWS, HIDDEN)
    y = plan.run(x, torch.arange(MAX_ROWS), new_step([1] * MAX_ROWS), None)
    assert torch.equal(y, x[:, 8:24])


def test_activations_of_a_layer_lie_where_those_of_the_one_before_did() -> None:
    pieces = []
    for num_layers in (NUM_LAYERS - 1, NUM_LAYERS):
        model = Model()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.NUM_LAYERS", num_layers)
            kept = recording.record(model, SHAPES, model.threads).kept
        assert isinstance(kept, list)
        pieces.append(sum(isinstance(piece, memoryview) for piece in kept))
    assert pieces[0] == pieces[1], "a layer more takes no more memory"


def test_nothing_is_done_while_a_step_is_recorded() -> None:
    model = Model()
    hidden, positions = torch.randn(1, HIDDEN), torch.zeros(1, dtype=torch.int64)
    expected = model(hidden.clone(), positions)
    caches = [cache.clone() for cache in model.caches]
    recording.record(model, SHAPES, model.threads)
    assert all(map(torch.equal, model.caches, caches))
    assert torch.equal(model(hidden.clone(), positions), expected)


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        (lambda x: x * 2, "aten.mul.Tensor"),
        (lambda x: x.add_(1), "aten.add_.Tensor"),
        (lambda x: x.zero_(), "aten.zero_.default"),
        (lambda x: x[0, 0].item(), "aten.item.default"),
        (lambda _: torch.zeros(3), "aten.zeros.default"),
        (lambda x: x.T.contiguous(), "aten.contiguous.default"),
        (lambda x: x[:, :16].reshape(-1, 8), "aten.reshape.default"),
        (lambda x: x.double(), "aten.to.dtype"),
        (lambda x: torch.empty(0), "aten.empty.memory_format"),  # noqa: ARG005
    ],
)  # fmt: skip
def test_what_has_no_function_is_named_and_not_left_out(
    extra: Callable[[Tensor], Any], found: str
) -> None:
    model = Model(extra=extra)
    with pytest.raises(recording.NotRecordableError, match=re.escape(found)):
        recording.record(model, SHAPES, model.threads)
    model.extra = None
    model.plan()  # nothing is noted any more


def test_views_and_results_that_are_no_tensor() -> None:
    seen = []
    model = Model(extra=lambda x: seen.append(x.view(-1)[3:].unsqueeze(0).expand(2, -1)))
    model.plan()
    assert seen, "views are no numbers of their own"
    with pytest.raises(recording.NotRecordableError, match="returns tuple, no tensor"):
        recording.record(lambda x, _: (x, x), SHAPES, model.threads)


def test_layers_with_heads_of_other_shapes_are_not_replayed() -> None:
    model = Model()
    other = decoding.DecodeLayer(2, NUM_KV_HEADS, 2 * HEAD_DIM, 0.3)
    cache = torch.zeros(NUM_BLOCKS, NUM_KV_HEADS, BLOCK_SIZE, 4 * HEAD_DIM)

    def both(hidden: Tensor, positions: Tensor) -> Tensor:
        query = torch.empty(len(hidden), 2, 2 * HEAD_DIM)
        other.attend(query, None, cache, query, model.step)
        return model(hidden, positions)

    found = recording.record(both, SHAPES, model.threads)
    with pytest.raises(recording.NotRecordableError, match="heads are of several shapes"):
        replay.Plan(found, model.threads)


def test_rows_that_do_not_grow_with_the_step_are_not_replayed() -> None:
    model = Model()

    def pooled(hidden: Tensor, positions: Tensor) -> Tensor:
        rows: Tensor = model.products[0](model(hidden, positions)[:1], None, model.bias)
        return rows

    found = recording.record(pooled, SHAPES, model.threads)
    with pytest.raises(recording.NotRecordableError, match="1 rows for 11 of the step"):
        replay.Plan(found, model.threads)


def test_processors_without_avx512_compute_the_same(tmp_path: Path) -> None:
    """Other vectors: once more, compiled for AVX2."""
    if not instructions.HAS_AVX512:
        pytest.skip("the tests above are compiled for AVX2 already")
    run_compiled_for_avx2(__file__, tmp_path)
