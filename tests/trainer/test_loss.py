from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference import ATOL, cross_entropy_loop
from trainer.batching import make_batch
from trainer.data import Sample
from trainer.loss import mean_loss, sample_losses
from trainer.model import BaseModel, load_base

SAMPLES = [
    Sample((4, 9, 100, 7, 30, 2), (False, False, True, True, False, True)),
    Sample((11, 12, 13), (False, False, True)),
]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base("tiny", tiny_model, dtype="float32")


@torch.no_grad()
def losses_by_loop(base: BaseModel, sample: Sample) -> list[float]:
    """One unpadded sample; position t - 1 predicts token t."""
    logits = base.model(torch.tensor([sample.token_ids])).logits[0].double().numpy()
    positions = [t for t in range(1, len(sample)) if sample.has_loss[t]]
    rows = np.stack([logits[t - 1] for t in positions])
    return cross_entropy_loop(rows, [sample.token_ids[t] for t in positions])


def test_losses_equal_a_loop_over_single_samples(base: BaseModel) -> None:
    batch = make_batch(SAMPLES, pad_token_id=2)
    expected = [losses_by_loop(base, sample) for sample in SAMPLES]
    sums, counts = sample_losses(base.model, batch)
    assert counts.tolist() == [3, 1]
    np.testing.assert_allclose(sums, [sum(e) for e in expected], atol=ATOL["logits-float32"])
    flat = [loss for losses in expected for loss in losses]
    assert float(mean_loss(base.model, batch).detach()) == pytest.approx(
        sum(flat) / len(flat), abs=ATOL["logits-float32"]
    )


def test_what_carries_no_loss_does_not_change_it(base: BaseModel) -> None:
    """The last token without loss is seen by nobody, so it may be anything."""
    batch = make_batch(SAMPLES[:1], pad_token_id=2)
    changed = Sample((*SAMPLES[0].token_ids, 77), (*SAMPLES[0].has_loss, False))
    torch.testing.assert_close(
        mean_loss(base.model, make_batch([changed], pad_token_id=2)), mean_loss(base.model, batch)
    )


def test_a_changed_target_does_change_it(base: BaseModel) -> None:
    ids = list(SAMPLES[1].token_ids)
    ids[-1] = 14
    changed = make_batch([Sample(tuple(ids), SAMPLES[1].has_loss)], pad_token_id=2)
    before = mean_loss(base.model, make_batch(SAMPLES[1:], pad_token_id=2))
    assert abs(float((mean_loss(base.model, changed) - before).detach())) > 1e-3
