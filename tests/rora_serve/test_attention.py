"""Our attention of decoding equals a loop's and vLLM's, and leaves to vLLM what it can not do."""

import importlib
import platform
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm._custom_ops as ops
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from tests.rora_serve.older_processor import run_compiled_for_avx2

# As rora_serve.engine.worker does: numba must come after vLLM.
attention = importlib.import_module("rora_serve.engine.attention")
backend = importlib.import_module("rora_serve.engine.attention_backend")
decoding = importlib.import_module("rora_serve.engine.decoding")
instructions = importlib.import_module("rora_serve.engine.instructions")

if platform.machine() != "x86_64":
    pytest.skip("other processors use vLLM's attention", allow_module_level=True)

SCALE = 0.3


@dataclass
class Case:
    """Sequences of random lengths, whose new tokens are not in the cache yet.

    keys, values: [num_seqs] of [length, num_kv_heads, head_dim], with the new token at the end.
    """

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    cache: Tensor
    table: Tensor
    slots: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(keys) for keys in self.keys], dtype=torch.int32)

    @property
    def new(self) -> tuple[Tensor, Tensor]:
        return torch.stack([k[-1] for k in self.keys]), torch.stack([v[-1] for v in self.values])

    def step(self) -> Any:
        return decoding.DecodeStep(self.lengths, self.table, self.slots, self.cache.shape[2])

    def layer(self, num_threads: int = 2) -> Any:
        _, num_heads, head_dim = self.query.shape
        num_kv_heads = self.cache.shape[1]
        return decoding.DecodeLayer(
            num_heads, num_kv_heads, head_dim, SCALE, num_threads=num_threads
        )

    def attend(self, num_threads: int = 2) -> Tensor:
        output = torch.full_like(self.query, torch.nan)
        self.layer(num_threads).attend(self.query, self.new, self.cache, output, self.step())
        return output


def new_case(
    lengths: list[int], *, group: int, num_kv_heads: int, head_dim: int, block_size: int, seed: int
) -> Case:
    """Sequences whose blocks lie anywhere in the cache, where nothing else is a number."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    blocks = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(blocks) + 3, generator=generator).tolist()
    cache = torch.full((len(order), num_kv_heads, block_size, 2 * head_dim), torch.nan)
    table = torch.zeros((len(lengths), max(blocks) + 1), dtype=torch.int32)
    keys = [random(length, num_kv_heads, head_dim) for length in lengths]
    values = [random(length, num_kv_heads, head_dim) for length in lengths]
    slots = []
    for seq, length in enumerate(lengths):
        for i in range(length):
            if i % block_size == 0:
                table[seq, i // block_size] = order.pop()
            block, offset = int(table[seq, i // block_size]), i % block_size
            if i == length - 1:
                slots.append(block * block_size + offset)
                continue
            for head in range(num_kv_heads):
                of_keys, of_values = cache[block, head].view(2, -1)
                of_keys.view(head_dim, block_size)[:, offset] = keys[seq][i, head]
                of_values.view(block_size, head_dim)[offset] = values[seq][i, head]
    query = random(len(lengths), group * num_kv_heads, head_dim)
    return Case(query, keys, values, cache, table, torch.tensor(slots))


def by_loop(case: Case) -> Tensor:
    """What attention is, in float64."""
    rows = []
    for query, keys, values in zip(case.query.double(), case.keys, case.values, strict=True):
        group = len(query) // keys.shape[1]
        for head, one in enumerate(query):
            scores = SCALE * keys[:, head // group].double() @ one
            rows.append(torch.softmax(scores, 0) @ values[:, head // group].double())
    return torch.stack(rows).view(case.query.shape)


def allowed(case: Case) -> float:
    """How far an output may be off, by roundings of scores that add up like a random walk.

    A score that is off by d takes a weight with it by a factor of 1 + d; weights of others make up.
    """
    head_dim = case.query.shape[2]
    key, value = (max(float(t.abs().max()) for t in parts) for parts in (case.keys, case.values))
    size = max(float(SCALE * case.query.abs().sum(2).max() * key), 1.0)
    return float(2**-24 * (head_dim**0.5 + 2) * size * value)


def check(output: Tensor, case: Case) -> None:
    torch.testing.assert_close(output.double(), by_loop(case), atol=allowed(case), rtol=0)


@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    group=st.sampled_from([1, 2, 3, 6, 7, 13]),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 32, 64, 80, 112, 128]),
    block_size=st.sampled_from([16, 32, 64, 128]),
    num_threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 9),
)
@settings(max_examples=120, deadline=None)
def test_it_equals_a_loop_in_float64(
    lengths: list[int],
    group: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    num_threads: int,
    seed: int,
) -> None:
    case = new_case(
        lengths,
        group=group,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        seed=seed,
    )
    check(case.attend(num_threads), case)
    check(case.attend(num_threads), case)  # the cache holds the new tokens by now


def small_case(lengths: list[int], seed: int = 0) -> Case:
    return new_case(lengths, group=3, num_kv_heads=3, head_dim=64, block_size=64, seed=seed)


@pytest.mark.parametrize("size", [1e-3, 30.0, 3e3])
def test_scores_of_any_size_make_weights(size: float) -> None:
    """From nearly alike to one that takes all, without a power that is too large."""
    case = small_case([1, 63, 64, 65, 200])
    case.query *= size
    output = case.attend()
    assert output.isfinite().all()
    check(output, case)


def test_a_sequence_has_the_same_bits_alone_and_beside_others() -> None:
    case = small_case([1, 500, 64, 65, 17, 128])
    together = case.attend()
    for seq in range(len(case.keys)):
        one = slice(seq, seq + 1)
        alone = Case(
            case.query[one], case.keys[one], case.values[one], case.cache, case.table[one],
            case.slots[one],
        )  # fmt: skip
        for num_threads in (1, 2, 3):
            assert torch.equal(alone.attend(num_threads), together[one])


def test_one_layer_after_the_other_and_step_after_step() -> None:
    """Steps differ in how many sequences and blocks they have; two layers take turns."""
    cases = [small_case(lengths, seed) for seed, lengths in enumerate([[70], [1, 2, 300], [5, 64]])]
    first, second = cases[0].layer(), cases[0].layer()
    for case in (*cases, *cases):
        step = case.step()
        for layer in (first, second):
            output = torch.empty_like(case.query)
            layer.attend(case.query, case.new, case.cache, output, step)
            check(output, case)


def test_a_block_that_is_filled_up_is_not_read_by_another_sequence_in_that_step() -> None:
    """vLLM finds a prefix in the step that makes it; its own functions write all, then read."""
    case = small_case([65, 64, 70])
    assert case.step().is_apart, "a block is full, and one sequence's"
    case.table[0, 0] = case.table[1, 0]
    assert not case.step().is_apart
    case.slots[1] -= 1
    assert case.step().is_apart, "what is not full by then is nobody else's"
    case = small_case([65, 64, 70])
    case.table[1, 1] = case.table[1, 0]
    assert case.step().is_apart, "beyond a sequence's end"
    case.slots[:] = -1
    assert case.step().is_apart, "nothing is put anywhere"


def test_memory_that_another_layer_let_grow_is_lent_anew() -> None:
    small, large = small_case([3]), small_case([3] * 50)
    layer, other = small.layer(5), large.layer(5)
    step = small.step()

    def attend() -> None:
        output = torch.full_like(small.query, torch.nan)
        layer.attend(small.query, small.new, small.cache, output, step)
        check(output, small)

    attend()
    other.attend(large.query, large.new, large.cache, torch.empty_like(large.query), large.step())
    assert layer._job.partial != other._job.partial
    attend()
    assert layer._job.partial == other._job.partial


def test_rows_that_are_none_are_zeros() -> None:
    case = small_case([3, 2, 5])
    step = decoding.DecodeStep(
        torch.tensor([3, 0, 0], dtype=torch.int32), case.table, case.slots, 64
    )
    output = torch.full_like(case.query, torch.nan)
    case.layer().attend(case.query, case.new, case.cache, output, step)
    torch.testing.assert_close(output[0].double(), by_loop(case)[0], atol=allowed(case), rtol=0)
    assert not output[1:].any()


def test_heads_may_lie_anywhere() -> None:
    case = small_case([3, 66])
    key, value = case.new
    # As vLLM's layers give them: the parts of one matrix; and, as no layer does, turned around.
    packed = torch.cat([t.flatten(1) for t in (case.query, key, value)], 1)
    views = [part.view(2, -1, 64) for part in packed.split([576, 192, 192], 1)]
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (case.query, key, value)]
    for query, *new in (views, turned):
        assert not query.is_contiguous()
        output = torch.empty(2, 64, 9).transpose(1, 2)
        case.layer().attend(query, tuple(new), case.cache, output, case.step())
        check(output, case)


def test_tokens_that_are_there_already_or_go_nowhere_leave_the_cache_alone() -> None:
    case = small_case([3, 66])
    case.attend()
    before = case.cache.clone()
    output = torch.empty_like(case.query)
    case.layer().attend(case.query, None, case.cache, output, case.step())
    check(output, case)
    case.slots[:] = -1
    other = tuple(torch.zeros_like(part) for part in case.new)
    case.layer().attend(case.query, other, case.cache, output, case.step())
    check(output, case)
    assert torch.equal(case.cache.isnan(), before.isnan())
    assert torch.equal(case.cache.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_vllm_reads_what_we_wrote_and_attends_alike(head_dim: int) -> None:
    """Its kernels and ours agree on where keys and values are."""
    case = new_case(
        [1, 64, 65, 300], group=3, num_kv_heads=2, head_dim=head_dim, block_size=64, seed=5
    )
    ours = case.attend()
    cache = case.cache
    num_blocks, num_kv_heads, block_size, _ = cache.shape
    keys, values = cache.view(num_blocks, num_kv_heads, 2 * block_size, -1).chunk(2, dim=2)
    written = cache.clone()
    ops.cpu_attn_reshape_and_cache(
        *case.new, keys, values, case.slots, "vec",
        k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto",
    )  # fmt: skip
    assert torch.equal(cache.nan_to_num(), written.nan_to_num()), "new tokens are where they belong"
    cache.nan_to_num_(0.0)
    lengths, starts = case.lengths, torch.arange(5, dtype=torch.int32)
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=4, num_heads=6, num_kv_heads=2, head_dim=head_dim, seq_lens=lengths,
        dtype=torch.float32, query_start_loc=starts, causal=True, sliding_window_size=-1,
        isa="vec", enable_kv_split=True,
    )  # fmt: skip
    theirs = torch.empty_like(ours)
    ops.cpu_attention_with_kv_cache(
        query=case.query, key_cache=keys, value_cache=values, output=theirs, query_start_loc=starts,
        seq_lens=lengths, scale=SCALE, causal=True, alibi_slopes=None, sliding_window=-1,
        block_table=case.table, softcap=0, scheduler_metadata=plan, s_aux=None,
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=allowed(case), rtol=0)


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({}, True),
        ({"max_query_len": 2}, False),
        ({"num_actual_tokens": 3}, False),
        ({"causal": False}, False),
        ({"dynamic_causal": torch.ones(2)}, False),
        ({"seq_lens": torch.tensor([3, 9])}, False),
        ({"block_table": torch.zeros((2, 4), dtype=torch.int64)}, False),
        ({"block_table": torch.zeros((4, 2), dtype=torch.int32).T}, False),
        ({"slot_mapping": torch.arange(2, dtype=torch.int32)}, False),
        ({"slot_mapping": torch.tensor([63, 5])}, False),
    ],
    ids=str,
)
def test_steps_are_ours_where_every_sequence_has_one_new_token(
    changes: dict[str, Any], is_ours: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "num_actual_tokens": 2, "max_query_len": 1, "max_seq_len": 9, "scheduler_metadata": None,
        "query_start_loc": torch.arange(3), "seq_lens": torch.tensor([3, 9], dtype=torch.int32),
        "block_table": torch.zeros((2, 4), dtype=torch.int32), "slot_mapping": torch.arange(2),
    }  # fmt: skip
    theirs = CPUAttentionMetadata(**(told | changes))
    monkeypatch.setattr(CPUAttentionMetadataBuilder, "build", lambda *_: theirs)
    builder = object.__new__(backend.DecodeMetadataBuilder)
    builder.block_size = 64
    for has_code in (True, False):
        builder._is_ours = has_code
        metadata = builder.build(0, None)
        assert (metadata.decode is not None) == (is_ours and has_code)
        assert metadata.seq_lens is theirs.seq_lens
        assert metadata.slot_mapping is theirs.slot_mapping


@pytest.mark.parametrize(
    "changes",
    [
        {"alibi_slopes": [0.1]},
        {"sliding_window": 8},
        {"logits_soft_cap": 30.0},
        {"sinks": torch.zeros(4)},
        {"attn_type": AttentionType.ENCODER_DECODER},
    ],
    ids=str,
)
def test_layers_that_attend_otherwise_stay_vllms(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With new tokens put where they belong first, as vLLM's layer leaves that to the backend."""
    called = []
    monkeypatch.setattr(
        "vllm.v1.attention.backends.cpu_attn.get_current_vllm_config",
        lambda: type("Config", (), {"model_config": type("Model", (), {"dtype": torch.float32})}),
    )
    for name in ("do_kv_cache_update", "forward"):
        note = lambda *_, name=name: called.append(name)  # noqa: E731
        monkeypatch.setattr(CPUAttentionBackendImpl, name, note)
    plain: dict[str, Any] = {
        "num_heads": 4, "head_size": 64, "scale": 1.0, "num_kv_heads": 2, "alibi_slopes": None,
        "sliding_window": None, "kv_cache_dtype": "auto",
    }  # fmt: skip
    case = new_case([5], group=2, num_kv_heads=2, head_dim=64, block_size=64, seed=0)
    metadata = backend.DecodeMetadata(
        num_actual_tokens=1, max_query_len=1, query_start_loc=torch.arange(2), max_seq_len=5,
        seq_lens=case.lengths, block_table=case.table, slot_mapping=case.slots,
        scheduler_metadata=None, decode=case.step(),
    )  # fmt: skip
    output = torch.empty_like(case.query)
    layer = SimpleNamespace(kv_sharing_target_layer_name=None)
    arguments = (layer, case.query, *case.new, case.cache)
    backend.DecodeImpl(**plain).forward(*arguments, metadata, output)
    assert not called, "a plain layer's step is ours"
    impl = backend.DecodeImpl(**(plain | changes))
    impl.forward(*arguments, metadata, output)
    assert called == ["do_kv_cache_update", "forward"]
    called.clear()
    impl.forward(*arguments, None, output)
    assert not called, "a warm-up"
    layer.kv_sharing_target_layer_name = "another layer's"
    impl.forward(*arguments, metadata, output)
    assert called == ["forward"]


def test_caches_without_code_stay_vllms() -> None:
    assert attention.can_attend(torch.float32, 64, 64)
    assert not attention.can_attend(torch.bfloat16, 64, 64)
    assert not attention.can_attend(torch.float32, 60, 64)
    assert not attention.can_attend(torch.float32, 64, 8 + 4)


def test_processors_without_avx512_attend_the_same(tmp_path: Path) -> None:
    """Other vectors, other tiles: once more, compiled for AVX2."""
    if not instructions.HAS_AVX512:
        pytest.skip("the tests above are compiled for AVX2 already")
    run_compiled_for_avx2(__file__, tmp_path)
