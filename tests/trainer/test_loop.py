import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import open_artifact, weights_digest
from adapters.digest import read_provenance
from adapters.errors import ConfigError, TrainingError
from tests.workloads import chat, write_lines
from trainer.config import AdapterSettings, DataSettings, LoopSettings, TrainConfig
from trainer.inject import adapters_off, inject_artifact
from trainer.loop import train
from trainer.model import load_base
from trainer.optim import learning_rate_factor

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
    *steps, evaluation = log_of(config)
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["epoch"] == 12
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert all(step["gradient_norm"] > 0 for step in steps)
    measured = evaluation["evaluation"]
    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    origin = read_provenance(folder)
    stored = origin["training"]["metrics"]["eval_sets"]["default"]
    assert measured == {"set": "default"} | stored
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
        counts[epochs] = len(log_of(config)) - 1
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
    with pytest.raises(TrainingError, match="every lora_B is zero"):
        run(config, tiny_model)
    assert not (config.output / "adapter").exists()


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
    assert "1 samples truncated to train.max_sample_tokens" in said
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
    assert [entry["evaluation"]["set"] for entry in log_of(config)[-2:]] == ["chats", "texts"]
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


def test_the_learning_rate_warms_up_and_comes_down() -> None:
    def course(schedule: Any) -> list[float]:
        return [
            learning_rate_factor(step, num_steps=10, warmup_ratio=0.2, schedule=schedule)
            for step in range(10)
        ]

    assert course("constant") == [0.5] + [1.0] * 9
    linear = [0.5, 1.0, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert course("linear") == pytest.approx(linear)
    cosine = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert course("cosine") == pytest.approx(cosine)
