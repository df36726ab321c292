import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.batching import IGNORED_LABEL, make_batch, plan_epoch
from trainer.data import Sample

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=200)


@given(lengths=LENGTHS, batch_tokens=st.integers(1, 1000), seed=st.integers(0, 2**32))
def test_every_sample_is_in_one_batch_within_the_budget(
    lengths: list[int], batch_tokens: int, seed: int
) -> None:
    plan = plan_epoch(lengths, batch_tokens=batch_tokens, seed=seed)
    assert sorted(index for batch in plan for index in batch) == list(range(len(lengths)))
    for batch in plan:
        padded = max(lengths[index] for index in batch) * len(batch)
        assert padded <= batch_tokens or len(batch) == 1


def test_the_seed_decides_the_order_and_another_seed_changes_it() -> None:
    lengths = [10 + index % 7 for index in range(100)]
    plans = [plan_epoch(lengths, batch_tokens=64, seed=seed) for seed in (1, 1, 2)]
    assert plans[0] == plans[1] != plans[2]


def test_samples_are_padded_on_the_right_and_padding_carries_no_loss() -> None:
    samples = [Sample((5, 6, 7), (False, True, True)), Sample((8,), (False,))]
    batch = make_batch(samples, pad_token_id=2)
    assert batch.token_ids.tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    none = IGNORED_LABEL
    assert batch.labels.tolist() == [[none, 6, 7], [none, none, none]]
    assert batch.num_tokens == 4
    assert batch.token_ids.dtype == torch.int64
