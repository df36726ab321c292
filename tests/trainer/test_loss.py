from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference import ATOL, cross_entropy_loop
from trainer.attention import PACKED
from trainer.batching import pad
from trainer.data import Sample
from trainer.loss import ModelLoss
from trainer.model import BaseModel, load_base

SAMPLES = [
    Sample((4, 9, 100, 7, 30, 2), (False, False, True, True, False, True)),
    Sample((11, 12, 13), (False, False, True)),
]
# Of one beginning and many lengths, as chats of one task are.
LIKE = [
    Sample(
        (1, 5, 6, 7, *(8 + (3 * n + m) % 80 for m in range(n)), 2),
        tuple(place > 3 + n // 2 for place in range(5 + n)),
    )
    for n in (3, 25, 9, 4, 14, 11, 3)
]


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    loaded = load_base("tiny", tiny_model, dtype="float32")
    loaded.model.set_attn_implementation(PACKED)
    return loaded


@torch.no_grad()
def losses_by_loop(base: BaseModel, sample: Sample) -> list[float]:
    """One unpadded sample; position t - 1 predicts token t."""
    ids = torch.tensor([sample.token_ids])
    logits = base.model(ids, use_cache=False).logits[0].double().numpy()
    positions = [t for t in range(1, len(sample)) if sample.has_loss[t]]
    rows = np.stack([logits[t - 1] for t in positions])
    return cross_entropy_loop(rows, [sample.token_ids[t] for t in positions])


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize(("packs", "shares"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[:1], LIKE])
def test_losses_equal_a_loop_over_single_samples(
    base: BaseModel, samples: list[Sample], packs: bool, shares: bool, plain_head: bool
) -> None:
    loss = ModelLoss(base, packs=packs, shares_prefix=shares, plain_head=plain_head)
    expected = [losses_by_loop(base, sample) for sample in samples]
    sums, counts = loss.sample_losses(samples)
    assert counts.tolist() == [len(e) for e in expected]
    means = [sum(e) / len(e) for e in expected]
    np.testing.assert_allclose(sums / counts, means, atol=ATOL["float32"])


@pytest.mark.parametrize("plain_head", [True, False])
def test_packed_gradients_equal_padded_ones(base: BaseModel, plain_head: bool) -> None:
    weight = base.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    gradients = []
    for packs, shares in ((False, False), (True, False), (True, True)):
        loss = ModelLoss(base, packs=packs, shares_prefix=shares, plain_head=plain_head)
        weight.requires_grad_().grad = None
        loss.token_losses(loss.make_batch(LIKE)).sum().backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    scale = float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5 * scale, rtol=1e-4)
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-5 * scale, rtol=1e-4)


def test_leakage_between_packed_samples_would_show(base: BaseModel) -> None:
    """The control: the same row with plain causal attention has other losses."""
    loss = ModelLoss(base, packs=True, shares_prefix=True, plain_head=True)
    batch = loss.make_batch(LIKE)
    right = loss.token_losses(batch)
    hidden = base.model.base_model(
        input_ids=batch.token_ids, position_ids=torch.arange(batch.token_ids.shape[1])[None]
    ).last_hidden_state
    logits = base.model.get_output_embeddings()(hidden[0, batch.loss_places])
    leaked = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    assert float((leaked - right).abs().max().detach()) > 0.01


def test_a_long_list_of_losses_is_formed_in_chunks(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = ModelLoss(base, packs=True, shares_prefix=True, plain_head=True)
    batch = loss.make_batch(LIKE)
    at_once = loss.token_losses(batch)
    monkeypatch.setattr("trainer.loss._CHUNK_LOGITS", 5 * 49152)
    in_chunks = loss.token_losses(batch)
    torch.testing.assert_close(in_chunks, at_once, atol=ATOL["float32"], rtol=0)


def test_what_carries_no_loss_does_not_change_it(base: BaseModel) -> None:
    """The last token without loss is seen by nobody, so it may be anything."""
    loss = ModelLoss(base, packs=True, shares_prefix=True, plain_head=True)
    changed = Sample((*SAMPLES[0].token_ids, 77), (*SAMPLES[0].has_loss, False))
    before, _ = loss.sample_losses(SAMPLES[:1])
    torch.testing.assert_close(loss.sample_losses([changed])[0], before)


def test_a_changed_target_does_change_it(base: BaseModel) -> None:
    loss = ModelLoss(base, packs=False, shares_prefix=False, plain_head=True)
    changed = Sample((*SAMPLES[1].token_ids[:-1], 14), SAMPLES[1].has_loss)
    difference = loss.sample_losses([changed])[0] - loss.sample_losses(SAMPLES[1:])[0]
    assert float(difference.abs()) > 1e-3


def test_noise_on_embeddings_is_uniform_and_for_training_alone(base: BaseModel) -> None:
    loss = ModelLoss(base, packs=True, shares_prefix=False, plain_head=True, neftune_alpha=5.0)
    quiet = ModelLoss(base, packs=True, shares_prefix=False, plain_head=True)
    batch = loss.make_batch(SAMPLES)
    torch.testing.assert_close(loss.token_losses(batch), quiet.token_losses(batch))
    base.model.train()
    seen = []
    hook = base.model.get_submodule("model.layers.0").register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    noisy, plain = loss.token_losses(batch), quiet.token_losses(batch)
    hook.remove()
    base.model.eval()
    assert not torch.equal(noisy, plain)
    noise = (seen[0] - seen[1]).abs()[0]
    # alpha / sqrt(tokens of the sample * hidden size): six tokens come first, then three.
    for rows, length in ((noise[:6], 6), (noise[6:], 3)):
        bound = 5.0 / (length * 48) ** 0.5
        assert 0.9 * bound < float(rows.max()) <= bound * 1.0001


def test_padding_needs_no_mask(base: BaseModel) -> None:
    batch = pad(SAMPLES, pad_token_id=2, device=torch.device("cpu"))
    other = pad(SAMPLES, pad_token_id=40, device=torch.device("cpu"))
    loss = ModelLoss(base, packs=False, shares_prefix=False, plain_head=True)
    assert torch.equal(loss.token_losses(batch), loss.token_losses(other))
