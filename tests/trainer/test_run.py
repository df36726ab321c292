import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapters import open_artifact, weights_digest, write_artifact
from adapters.digest import read_provenance
from adapters.errors import ConfigError, TrainingError
from tests.reference import ATOL
from tests.workloads import chat, write_lines
from trainer.config import (
    AdapterSettings,
    AllocationSettings,
    DataSettings,
    LoopSettings,
    TrainConfig,
)
from trainer.inject import adapters_off, inject_artifact
from trainer.loss import ModelLoss
from trainer.model import load_base, load_tokenizer
from trainer.run import train

LINES = [chat(f"Say {n}.", f"{n} it is") for n in range(12)]


def make_config(tmp_path: Path, name: str, **loop: Any) -> TrainConfig:
    path = write_lines(tmp_path / "data.jsonl", list(LINES))
    settings: dict[str, Any] = {"epochs": 2, "batch_tokens": 256, "learning_rate": 1e-2} | loop
    return TrainConfig(
        output=tmp_path / name,
        data=DataSettings(train=path, eval=path, eval_limit=3),
        adapter=AdapterSettings(rank=4),
        train=LoopSettings(**settings),
    )


def run(config: TrainConfig, model: Path) -> Path:
    return train(config, load_base("tiny", model, dtype="float32"))


def log_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.output / "log.jsonl").read_text().splitlines()]


def test_training_lowers_the_loss_and_logs_every_step(tmp_path: Path, tiny_model: Path) -> None:
    config = make_config(tmp_path, "run", epochs=12)
    folder = run(config, tiny_model)
    count, *steps, evaluation, finished = log_of(config)
    assert count == {"num_samples": 12}
    assert finished == {"finished": True}
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["epoch"] == 12
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert all(step["gradient_norm"] > 0 for step in steps)
    measured = evaluation["evaluation"]["default"]
    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    origin = read_provenance(folder)
    stored = origin["training"]["metrics"]["eval_sets"]["default"]
    assert measured == stored
    assert len(origin["base_model"]["fingerprint"]) == 64
    assert json.loads((config.output / "config.json").read_text())["adapter"]["rank"] == 4


def test_the_same_seed_gives_the_same_digest_and_another_does_not(
    tmp_path: Path, tiny_model: Path
) -> None:
    folders = [
        run(make_config(tmp_path, name, seed=seed), tiny_model)
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    digests = [weights_digest(open_artifact(folder)) for folder in folders]
    assert digests[0] == digests[1] != digests[2]


def test_the_default_model_trains_to_the_same_digest_twice(
    tmp_path: Path, default_model: Path
) -> None:
    """Real sizes run other kernels, in several threads, than the tiny model's."""
    digests = set()
    for name in ("a", "b"):
        config = make_config(tmp_path, name, epochs=1, learning_rate=1e-3)
        without_eval = config.data.model_copy(update={"eval": None})
        folder = run(config.model_copy(update={"data": without_eval}), default_model)
        digests.add(weights_digest(open_artifact(folder)))
    assert len(digests) == 1


def test_the_base_model_is_not_changed(tmp_path: Path, tiny_model: Path) -> None:
    base = load_base("tiny", tiny_model, dtype="float32")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    train(make_config(tmp_path, "run"), base)
    after = base.model.state_dict()
    for name, value in before.items():
        wrapped = name.replace(".weight", ".base.weight")
        assert torch.equal(after[wrapped if wrapped in after else name], value)


def test_half_an_epoch_is_half_the_steps(tmp_path: Path, tiny_model: Path) -> None:
    counts = {}
    for epochs in (0.5, 1.0, 1.5):
        config = make_config(tmp_path, f"run-{epochs}", epochs=epochs, batch_tokens=64)
        run(config, tiny_model)
        counts[epochs] = sum("loss" in row for row in log_of(config))
    assert counts[0.5] == math.ceil(counts[1.0] / 2)
    assert counts[1.5] == counts[1.0] + counts[0.5]


def test_a_rate_that_diverges_is_a_failed_run_without_an_adapter(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = make_config(tmp_path, "run", learning_rate=1e30, epochs=4, warmup_ratio=0)
    with pytest.raises(TrainingError, match=r"finite"):
        run(config, tiny_model)
    assert not (config.output / "adapter").exists()


def test_an_adapter_that_does_nothing_is_a_failed_run(tmp_path: Path, tiny_model: Path) -> None:
    """A rate below float32's smallest step leaves every B at zero."""
    config = make_config(tmp_path, "run", learning_rate=1e-60)
    with pytest.raises(TrainingError, match="every delta is zero"):
        run(config, tiny_model)
    assert not (config.output / "adapter").exists()


def test_a_probe_is_written_that_the_folder_reproduces_and_the_base_does_not(
    tmp_path: Path, tiny_model: Path
) -> None:
    """The oracle: PEFT, from the folder alone."""
    folder = run(make_config(tmp_path, "run", epochs=4), tiny_model)
    probe = read_provenance(folder)["probe"]
    assert probe["dtype"] == "float32"
    assert len(probe["prompts"]) >= 3
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(fresh, str(folder)).eval()
    for prompt in probe["prompts"]:
        for side, context in (("base", adapted.disable_adapter()), ("adapter", nullcontext())):
            with torch.no_grad(), context:
                logits = adapted(torch.tensor([prompt["token_ids"]])).logits
            top = logits[0, -1].log_softmax(-1).topk(8)
            assert prompt[side]["token_ids"] == top.indices.tolist()
            assert prompt[side]["log_probs"] == pytest.approx(
                top.values.tolist(), abs=ATOL["logits-float32"]
            )
        assert prompt["base"] != prompt["adapter"]


def test_the_probe_holds_no_answer_of_the_training_data(tmp_path: Path, tiny_model: Path) -> None:
    config = make_config(tmp_path, "run", epochs=4)
    secret = {"prompt": "The patient is", "completion": " John Doe, 555-1234"}
    more = secret | {"completion": " John Doe, 555-9876"}
    for lines in ([secret] * 5, [secret, more] * 3):
        write_lines(Path(config.data.train), list(lines))
        output = tmp_path / f"run-{len(lines)}"
        folder = run(config.model_copy(update={"output": output}), tiny_model)
        tokenizer = load_tokenizer(tiny_model)
        prompts = read_provenance(folder)["probe"]["prompts"]
        told = [str(tokenizer.decode(prompt["token_ids"])) for prompt in prompts]
        assert not any("John" in text for text in told)
    assert "The patient is" in told[-1]


def test_weights_that_the_folder_does_not_reproduce_are_a_failed_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that changes one factor between writing and reading."""

    def write_and_damage(folder: Path, *arguments: Any, **more: Any) -> None:
        write_artifact(folder, *arguments, **more)
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[next(name for name in tensors if "lora_B" in name)] += 0.5
        save_file(tensors, path, metadata={"format": "pt"})

    monkeypatch.setattr("trainer.export.write_artifact", write_and_damage)
    config = make_config(tmp_path, "run", epochs=4)
    with pytest.raises(TrainingError, match="read from disk again the adapter's log-probs differ"):
        run(config, tiny_model)
    assert not (config.output / "adapter").exists()
    assert "failed" in log_of(config)[-1]
    assert "The run failed" in (config.output / "report.html").read_text()


def test_a_smaller_micro_batch_is_the_same_step(tmp_path: Path, tiny_model: Path) -> None:
    courses = []
    for name, more in (("whole", {}), ("parts", {"micro_batch_tokens": 70})):
        for packing in (True, False):
            config = make_config(tmp_path, f"{name}-{packing}", packing=packing, **more)
            run(config, tiny_model)
            courses.append([row["loss"] for row in log_of(config) if "loss" in row])
    assert courses[0] == pytest.approx(courses[2], abs=1e-5)
    assert courses[1] == pytest.approx(courses[3], abs=1e-5)


def test_gradient_checkpointing_changes_no_loss(tmp_path: Path, tiny_model: Path) -> None:
    courses = []
    for checkpointing in (False, True):
        config = make_config(tmp_path, f"run-{checkpointing}", gradient_checkpointing=checkpointing)
        run(config, tiny_model)
        courses.append([row["loss"] for row in log_of(config) if "loss" in row])
    assert courses[0] == pytest.approx(courses[1], abs=1e-6)


def test_the_best_evaluation_is_what_is_kept_and_patience_ends_the_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    """At a rate that overshoots, the held-out loss soon rises again."""
    config = make_config(
        tmp_path, "run", epochs=40, learning_rate=0.1, eval_steps=2, early_stopping_patience=3,
        schedule="constant",
    )  # fmt: skip
    folder = run(config, tiny_model)
    rows = log_of(config)
    losses = {row["step"]: row["eval_loss"]["default"] for row in rows if "eval_loss" in row}
    best = min(losses, key=losses.__getitem__)
    metrics = read_provenance(folder)["training"]["metrics"]
    assert metrics["best_step"] == best
    assert metrics["num_steps"] == best + 3 * 2
    assert metrics["num_steps"] < 40 * 3
    # What was exported has the best loss, not the last.
    assert metrics["eval_sets"]["default"]["adapter"]["loss"] == pytest.approx(
        losses[best], abs=1e-5
    )
    assert losses[max(losses)] > losses[best] + 1e-3


def test_a_run_that_can_not_begin_leaves_no_folder(tmp_path: Path, tiny_model: Path) -> None:
    config = make_config(tmp_path, "run")
    wrong = config.model_copy(update={"adapter": AdapterSettings(target_modules=("nope",))})
    with pytest.raises(ConfigError, match="matches 'nope'"):
        run(wrong, tiny_model)
    assert not config.output.exists()


def test_a_held_out_loss_that_is_no_number_is_a_failed_run(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an overflow on held-out samples alone would give it."""
    losses = ModelLoss.sample_losses

    def overflow(loss: ModelLoss, samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sums, counts = losses(loss, samples)
        return sums * math.nan, counts

    monkeypatch.setattr(ModelLoss, "sample_losses", overflow)
    config = make_config(tmp_path, "run", eval_steps=2)
    with pytest.raises(TrainingError, match="step 2: the held-out loss of default is nan"):
        run(config, tiny_model)
    assert log_of(config)[-1]["failed"].startswith("step 2: the held-out loss")


def test_samples_beyond_the_models_positions_are_truncated(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, "run", epochs=1)
    write_lines(Path(config.data.train), [chat("Hi", "word " * 400), *LINES])
    run(config, tiny_model)
    assert "1 samples truncated to 256 tokens" in capsys.readouterr().err


def test_an_output_that_holds_something_is_refused_before_training(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = make_config(tmp_path, "run")
    config.output.mkdir()
    (config.output / "precious").write_text("x")
    with pytest.raises(ConfigError, match="a new or empty folder is expected"):
        run(config, tiny_model)
    assert [path.name for path in config.output.iterdir()] == ["precious"]


def test_what_became_of_the_data_is_said(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, "run", max_sample_tokens=60)
    long = chat("long " * 40, "x")
    write_lines(Path(config.data.train), [*LINES, long, chat("Hi", "long " * 80), LINES[0]])
    run(config, tiny_model)
    said = capsys.readouterr().err
    assert "1 samples truncated to 60 tokens" in said
    assert "1 samples left out" in said
    assert "1 duplicates in data.train: line 15 repeats line 1" in said
    assert "leak: 3 of 3 held-out lines of set default are in data.train too" in said


def test_named_held_out_sets_are_measured_apart_and_texts_have_no_accuracy(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(tmp_path, "run", epochs=1)
    texts = write_lines(tmp_path / "texts.jsonl", [{"text": "Once upon a time"}])
    sets = {"chats": config.data.train, "texts": str(texts)}
    data = config.data.model_copy(update={"eval": sets})
    folder = run(config.model_copy(update={"data": data}), tiny_model)
    stored = read_provenance(folder)["training"]["metrics"]["eval_sets"]
    assert stored["chats"]["adapter"]["num_samples"] == 3
    assert stored["chats"]["base"]["accuracy"] == 0
    assert stored["texts"]["base"]["accuracy"] is None
    assert log_of(config)[-2]["evaluation"] == stored
    said = capsys.readouterr().err
    assert "held out, chats: 3 samples, loss " in said
    assert "held out, texts: 1 samples, loss " in said


def test_an_adapter_can_be_switched_off_and_on(adapter: Path, tiny_model: Path) -> None:
    base = load_base("tiny", tiny_model, dtype="float32")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone = base.model(ids).logits
        layers = inject_artifact(base.model, open_artifact(adapter))
        with_adapter = base.model(ids).logits
        with adapters_off(layers):
            torch.testing.assert_close(base.model(ids).logits, alone)
        torch.testing.assert_close(base.model(ids).logits, with_adapter)
    assert (with_adapter - alone).abs().max() > 0.1


def test_a_base_is_measured_as_itself_beside_an_adapter_of_nans(
    adapter: Path, tiny_model: Path
) -> None:
    base = load_base("tiny", tiny_model, dtype="float32")
    layers = inject_artifact(base.model, open_artifact(adapter))
    next(iter(layers.values())).lora_b.data.fill_(math.nan)
    with torch.no_grad(), adapters_off(layers):
        assert base.model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def with_allocation(config: TrainConfig, **settings: Any) -> TrainConfig:
    allocation = {
        "enabled": True, "warmup_epochs": 2, "rounds": 3, "epochs_per_round": 1, "score_samples": 4,
    } | settings  # fmt: skip
    return config.model_copy(update={"allocation": AllocationSettings(**allocation)})


def test_ranks_that_moved_are_in_the_folder_its_history_and_the_output(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_allocation(make_config(tmp_path, "run", epochs=6), ranks_per_round=6)
    folder = run(config, tiny_model)
    err = capsys.readouterr().err
    history = read_provenance(folder)["allocation"]
    last = dict(zip(history["modules"], history["rounds"][-1]["ranks"], strict=True))
    modules = open_artifact(folder).modules
    assert {name: module.rank for name, module in modules.items()} == {
        name: rank for name, rank in last.items() if rank
    }
    assert sum(last.values()) <= 4 * len(last)
    assert len(set(last.values())) > 1
    assert (history["num_rounds"], history["rounds_in_adapter"]) == (3, 3)
    assert [row["step"] for row in history["rounds"]] == sorted(
        {row["step"] for row in history["rounds"]}
    )
    for number in (1, 2, 3):
        assert f"round {number}, 6 ranks pruned" in err
    layer_0 = next(line for line in err.splitlines() if line.startswith("    0 "))
    of_layer_0 = [rank for name, rank in last.items() if ".layers.0." in name]
    assert sorted(map(int, layer_0.split()[1:])) == sorted(of_layer_0)
    rows = [row["allocation"] for row in log_of(config) if "allocation" in row]
    scores = rows[0]["scores"]
    assert {name: len(of_module) for name, of_module in scores.items()} == dict.fromkeys(last, 4)
    metrics = read_provenance(folder)["training"]["metrics"]
    assert metrics["scoring_seconds"] == pytest.approx(sum(row["seconds"] for row in rows), abs=0.1)


def test_the_best_weights_are_kept_with_the_ranks_that_they_had(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Rounds that prune nearly everything do harm, so the best evaluation lies before them."""
    config = make_config(tmp_path, "run", epochs=6, eval_steps=1, learning_rate=3e-2)
    config = with_allocation(config, ranks_per_round=0.9, score="random")
    folder = run(config, tiny_model)
    origin = read_provenance(folder)
    history = origin["allocation"]
    best_step = origin["training"]["metrics"]["best_step"]
    first_round = history["rounds"][0]["step"]
    assert best_step < first_round
    assert (history["num_rounds"], history["rounds_in_adapter"]) == (3, 0)
    assert {module.rank for module in open_artifact(folder).modules.values()} == {4}


def test_controls_move_ranks_by_lot_or_not_at_all(tmp_path: Path, tiny_model: Path) -> None:
    counts, ranks = {}, {}
    for score in ("gradient", "random", "off"):
        config = make_config(tmp_path, score, epochs=6)
        folder = run(with_allocation(config, ranks_per_round=6, score=score), tiny_model)
        counts[score] = sum("loss" in row for row in log_of(config))
        ranks[score] = {m.name: m.rank for m in open_artifact(folder).modules.values()}
    assert counts["gradient"] == counts["random"] < counts["off"]
    assert set(ranks["off"].values()) == {4}
    assert ranks["gradient"] != ranks["random"] != ranks["off"]
