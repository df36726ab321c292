import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.batching import Batch, pack, pad, plan_epoch, split_step
from trainer.data import Sample

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)
CPU = torch.device("cpu")


@given(
    lengths=LENGTHS,
    batch_tokens=st.integers(1, 1000),
    seed=st.integers(0, 2**32),
    packed=st.booleans(),
)
def test_every_sample_is_in_one_step_within_the_budget(
    lengths: list[int], batch_tokens: int, seed: int, packed: bool
) -> None:
    plan = plan_epoch(lengths, batch_tokens=batch_tokens, seed=seed, packed=packed)
    assert sorted(index for step in plan for index in step) == list(range(len(lengths)))
    for step in plan:
        sizes = [lengths[index] for index in step]
        used = sum(sizes) if packed else max(sizes) * len(sizes)
        assert used <= batch_tokens or len(step) == 1


def test_the_seed_decides_the_order_and_another_seed_changes_it() -> None:
    lengths = [10 + index % 7 for index in range(100)]
    for packed in (True, False):
        plans = [
            plan_epoch(lengths, batch_tokens=64, seed=seed, packed=packed) for seed in (1, 1, 2)
        ]
        assert plans[0] == plans[1] != plans[2]


def test_packed_steps_are_full_and_padded_ones_hold_similar_lengths() -> None:
    lengths = [10 + 7 * index % 50 for index in range(400)]
    packed = plan_epoch(lengths, batch_tokens=512, seed=3, packed=True)
    assert sum(lengths) / (512 * len(packed)) > 0.9
    padded = plan_epoch(lengths, batch_tokens=512, seed=3, packed=False)
    spans = [max(lengths[i] for i in step) - min(lengths[i] for i in step) for step in padded]
    assert sum(spans) / len(spans) < 5


@given(
    lengths=LENGTHS,
    num_processes=st.integers(1, 5),
    max_tokens=st.integers(1, 600),
    packed=st.booleans(),
)
def test_a_split_step_is_the_same_step(
    lengths: list[int], num_processes: int, max_tokens: int, packed: bool
) -> None:
    step = list(range(0, len(lengths), 2))
    shares = split_step(
        step, lengths, num_processes=num_processes, max_tokens=max_tokens, packed=packed
    )
    assert len(shares) == num_processes
    assert sorted(i for share in shares for batch in share for i in batch) == step
    loads = [sum(lengths[i] for batch in share for i in batch) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    for batch in (batch for share in shares for batch in share):
        sizes = [lengths[index] for index in batch]
        used = sum(sizes) if packed else max(sizes) * len(sizes)
        assert used <= max_tokens or len(batch) == 1


def test_samples_are_padded_on_the_right_and_padding_carries_no_loss() -> None:
    samples = [Sample((5, 6, 7), (False, True, True)), Sample((8, 9), (False, True))]
    batch = pad(samples, pad_token_id=2, device=CPU)
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 9, 2]]
    assert predictions(batch) == {(0, (5,), 6), (0, (5, 6), 7), (1, (8,), 9)}


def test_a_packed_row_holds_the_shared_prefix_once_and_every_prediction() -> None:
    samples = [
        Sample((1, 2, 3, 4), (False, False, False, True)),
        Sample((1, 2, 3, 8, 9, 2), (False, False, False, False, True, True)),
        Sample((1, 2, 7), (False, False, True)),
    ]
    batch = pack(samples, share_prefix=True, device=CPU)
    assert batch.layout is not None
    # The third sample's loss is predicted by its second token, which so is its own.
    assert batch.layout.num_prefix == 1
    assert batch.token_ids.tolist() == [[1, 2, 3, 8, 9, 2, 2, 3, 4, 2, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 1, 2, 3, 1, 2]]
    assert batch.targets.tolist() == [9, 2, 4, 7]
    assert batch.owners.tolist() == [1, 1, 0, 2]
    assert batch.loss_places.tolist() == [3, 4, 7, 9]
    alone = pack(samples, share_prefix=False, device=CPU)
    assert alone.token_ids.shape[1] == sum(map(len, samples))


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=2, max_size=9), st.integers(1, 8)),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
)
def test_packing_keeps_every_sample_and_its_loss(
    drawn: list[tuple[list[int], int]], share: bool
) -> None:
    samples = [
        Sample(tuple(ids), tuple(place >= min(first, len(ids) - 1) for place in range(len(ids))))
        for ids, first in drawn
    ]
    batch = pack(samples, share_prefix=share, device=CPU)
    assert batch.layout is not None
    num_prefix = batch.layout.num_prefix
    row, positions = batch.token_ids[0].tolist(), batch.position_ids[0].tolist()
    rebuilt = []
    for place in range(num_prefix, len(row)):
        if positions[place] == num_prefix:
            rebuilt.append(row[:num_prefix])
        rebuilt[-1].append(row[place])
    assert sorted(rebuilt) == sorted(list(sample.token_ids) for sample in samples)
    expected = sorted(
        (index, sample.token_ids[place])
        for index, sample in enumerate(samples)
        for place in sample.loss_places
    )
    assert sorted(zip(batch.owners.tolist(), batch.targets.tolist(), strict=True)) == expected
    for place, target in zip(batch.loss_places.tolist(), batch.targets.tolist(), strict=True):
        assert place >= num_prefix
        assert row[place + 1] == target


def predictions(batch: Batch) -> set[tuple[int, tuple[int, ...], int]]:
    """Which tokens of a padded batch predict what: (sample, tokens so far, target)."""
    flat = batch.token_ids.flatten().tolist()
    columns = batch.token_ids.shape[1]
    return {
        (owner, tuple(flat[owner * columns : place + 1]), target)
        for owner, place, target in zip(
            batch.owners.tolist(), batch.loss_places.tolist(), batch.targets.tolist(), strict=True
        )
    }
