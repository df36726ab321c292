"""What we train is what PEFT loads: the same logits, from the folder on disk, by its own code."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from adapters import AdapterConfig, open_artifact, write_artifact
from tests.conftest import LINEAR
from tests.reference import ATOL
from tests.workloads import chat, make_random_adapter, write_lines
from trainer.allocation import Allocation, Move, trained_config
from trainer.config import (
    AdapterSettings,
    AllocationSettings,
    DataSettings,
    LoopSettings,
    TrainConfig,
)
from trainer.data import tokenize
from trainer.evaluate import evaluate
from trainer.export import peft_targets
from trainer.inject import inject, inject_artifact, target_modules
from trainer.lines import read_examples
from trainer.model import load_base
from trainer.optim import RankAdamW
from trainer.run import train
from trainer.trial import find_model_loss

LINES = [chat(f"Say {word}.", word * 3) for word in ("red", "blue", "green", "grey", "black")]


@torch.no_grad()
def logits(model: torch.nn.Module, token_ids: tuple[int, ...]) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return result


@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize("method", ["lora", "rora"])
def test_a_trained_folder_gives_the_trainers_own_logits_in_peft(
    tmp_path: Path, default_model: Path, method: Literal["lora", "rora"], rank: int
) -> None:
    """On the real default model, with every module adapted and moved by real steps."""
    config = TrainConfig(
        output=tmp_path / "run",
        data=DataSettings(train=write_lines(tmp_path / "data.jsonl", list(LINES))),
        adapter=AdapterSettings(method=method, rank=rank),
        train=LoopSettings(epochs=2, batch_tokens=128, learning_rate=2e-3),
    )
    base = load_base("smollm2", default_model, dtype="float32")
    folder = train(config, base)
    base.model.eval()
    sample = tokenize(read_examples(Path(config.data.train))[1], base.tokenizer)
    ours = logits(base.model, sample.token_ids)

    untouched = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    alone = logits(untouched, sample.token_ids)
    theirs = logits(PeftModel.from_pretrained(untouched, str(folder)).eval(), sample.token_ids)
    difference = float((ours - theirs).abs().max())
    assert difference <= ATOL["logits-float32"]
    # The control: an adapter that did not apply would be this far off.
    assert float((alone - theirs).abs().max()) > 0.1

    artifact = open_artifact(folder)
    assert {module.rank for module in artifact.modules.values()} == {rank}
    assert artifact.config.use_rslora == (method == "rora")


def test_our_own_reader_gives_pefts_logits_for_ranks_that_differ(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = AdapterConfig(
        6,
        8,
        use_rslora=True,
        rank_pattern={"q_proj": 3, "layers.1.mlp.up_proj": 11},
        # The first one that matches counts: the second is the wider one.
        alpha_pattern={"layers.0.self_attn.v_proj": 2, "v_proj": 5, "up_proj": 20},
        target_modules=LINEAR[:-1],
    )
    adapter = make_random_adapter(
        tmp_path / "a", tiny_model, config=config, modules=LINEAR[:-1], seed=4
    )
    base = load_base("tiny", tiny_model, dtype="float32")
    inject_artifact(base.model, open_artifact(adapter))
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(adapter)).eval()
    ids = tuple(range(20, 40))
    torch.testing.assert_close(
        logits(base.model, ids), logits(theirs, ids), atol=ATOL["logits-float32"], rtol=0
    )


def test_held_out_loss_equals_that_of_peft(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    chats = list(read_examples(write_lines(tmp_path / "d.jsonl", list(LINES))).values())
    base = load_base("tiny", tiny_model, dtype="float32")
    samples = [tokenize(line, base.tokenizer) for line in chats]
    loss, _ = find_model_loss(base, longest=max(map(len, samples)), packing=True)
    assert loss.packs
    inject_artifact(base.model, open_artifact(adapter))
    ours = evaluate(loss, chats, batch_tokens=100, progress=lambda _: None).loss
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(fresh, str(adapter)).eval()
    total, count = 0.0, 0
    for line in chats:
        sample = tokenize(line, base.tokenizer)
        log_probs = logits(theirs, sample.token_ids).log_softmax(-1)
        for t in range(1, len(sample)):
            if sample.has_loss[t]:
                total -= float(log_probs[t - 1, sample.token_ids[t]])
                count += 1
    assert ours == pytest.approx(total / count, abs=ATOL["logits-float32"])


@pytest.mark.parametrize("scale_rank", ["current", "initial"])
@pytest.mark.parametrize("method", ["lora", "rora"])
def test_pruned_and_grown_ranks_give_the_gated_models_logits_in_peft(
    tmp_path: Path,
    tiny_model: Path,
    method: Literal["lora", "rora"],
    scale_rank: Literal["current", "initial"],
) -> None:
    """Ranks 0 to 12, written with patterns, against the whole adapter with gates at zero."""
    base = load_base("tiny", tiny_model, dtype="float32")
    modules = target_modules(base.model, ("all-linear",))
    config = AdapterConfig(4, 8.0, use_rslora=method == "rora", target_modules=tuple(modules))
    generator = torch.Generator().manual_seed(0)
    layers = inject(base.model, modules, config, dropout=0.0, generator=generator)
    for layer in layers.values():
        layer.lora_b.data.normal_(std=0.05, generator=generator)
    first, second, *_, last = layers
    tokens = tuple(range(20, 60))
    whole = logits(base.model, tokens)
    layers[first].gates = torch.zeros(4)
    layers[second].gates = torch.tensor([1.0, 0.0, 1.0, 1.0])
    gated = logits(base.model, tokens)
    layers[first].gates = layers[second].gates = None

    settings = TrainConfig(
        output=tmp_path / "unused",
        data=DataSettings(train="unused"),
        adapter=AdapterSettings(method=method, rank=4, alpha=8.0),
        allocation=AllocationSettings(enabled=True, scale_rank=scale_rank, ranks_per_round=9),
        train=LoopSettings(epochs=3),
    )
    allocation = Allocation(settings, len(layers), rounds_after=(1,), score_samples=())
    optimizer = RankAdamW(layers, weight_decay=0.0)
    allocation.apply(Move({first: (0, 1, 2, 3), second: (1,)}, {last: 5}), optimizer, 1)
    moved = logits(base.model, tokens)
    assert float((moved - gated).abs().max()) <= ATOL["logits-float32"]
    # Growing alone changes no logit.
    optimizer.resize(last, range(9), 3, scaling=allocation.scaling(12), generator=generator)
    assert float((logits(base.model, tokens) - moved).abs().max()) <= ATOL["float32"]

    written = trained_config(config, layers)
    targets = peft_targets(base, list(written.target_modules))
    factors = {
        name: (layer.lora_a.detach().numpy(), layer.lora_b.detach().numpy())
        for name, layer in layers.items()
        if layer.rank
    }
    folder = tmp_path / "adapter"
    written = replace(written, target_modules=tuple(targets))
    write_artifact(folder, written, factors, provenance={"format": 1})
    ranks = {name: module.rank for name, module in open_artifact(folder).modules.items()}
    assert (first in ranks, ranks[second], ranks[last]) == (False, 3, 12)
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = logits(PeftModel.from_pretrained(fresh, str(folder)).eval(), tokens)
    assert float((theirs - gated).abs().max()) <= ATOL["logits-float32"]
    # The control: gates change what is computed by far more.
    assert float((whole - gated).abs().max()) > 0.1
