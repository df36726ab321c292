"""Runs that are stopped and go on, and runs of several processes: real commands."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import open_artifact, weights_digest
from adapters.errors import ConfigError, TrainingError
from tests.workloads import chat, write_lines
from trainer.cli import main
from trainer.model import load_base
from trainer.run import resume
from trainer.run_folder import owned

NUM_KILLS = 3


def write_config(folder: Path, model: Path, **train: Any) -> Path:
    """A run with all that a resume could forget: dropout, noise, moments, a best one, ranks."""
    data = write_lines(
        folder / "data.jsonl", [chat(f"Say {n}.", f"{n} it is" * (1 + n % 3)) for n in range(40)]
    )
    settings: dict[str, Any] = {
        "epochs": 12, "batch_tokens": 512, "learning_rate": 1e-2, "dtype": "float32",
        "checkpoint_steps": 3, "eval_steps": 7, "neftune_alpha": 1.0, "weight_decay": 0.01,
    } | train  # fmt: skip
    lines = [
        f'model = "{model}"',
        f'data.train = "{data}"',
        f'data.eval = "{data}"',
        "data.eval_limit = 4",
        "adapter.rank = 4",
        "adapter.dropout = 0.1",
        f"allocation.enabled = {json.dumps(settings['epochs'] > 1)}",
        "allocation.warmup_epochs = 2",
        "allocation.rounds = 10",
        "allocation.epochs_per_round = 1",
        "allocation.ranks_per_round = 4",
        "allocation.score_samples = 8",
        *(f"train.{key} = {json.dumps(value)}" for key, value in settings.items()),
    ]
    path = folder / "train.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, "trainer", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return out


def steps_of(run_folder: Path, *, not_of_file: int = 0) -> list[dict[str, Any]]:
    """The steps in a run's log; none while it is still the file of that number."""
    path = run_folder / "log.jsonl"
    is_new = path.exists() and path.stat().st_ino != not_of_file
    lines = path.read_text().splitlines() if is_new else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "loss" in row]


def moves_of(run_folder: Path) -> list[dict[str, Any]]:
    """The rounds in a run's log, but for the time that they took."""
    rows = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    rounds = [row["allocation"] for row in rows if "allocation" in row]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rounds]


@pytest.mark.timeout(600)
def test_killed_at_random_steps_and_resumed_a_run_ends_with_the_same_digest(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = write_config(tmp_path, tiny_model)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(start("run", str(config), "--output", str(whole)))
    num_steps = len(steps_of(whole))
    shuffler = random.Random(time.time_ns())
    seed = shuffler.randrange(2**32)
    print("seed of the kills:", seed)
    shuffler.seed(seed)
    points = sorted(shuffler.sample(range(1, num_steps - 2), NUM_KILLS))
    arguments = ["run", str(config), "--output", str(killed)]
    for point in points:
        log = killed / "log.jsonl"
        # A process replaces the log that it finds, and may take steps again that it holds.
        before = log.stat().st_ino if log.exists() else 0
        process = start(*arguments)
        while process.poll() is None and len(steps_of(killed, not_of_file=before)) < point:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"the run ended before step {point}"
        arguments = ["resume", str(killed)]
    finish(start(*arguments))
    digests = {weights_digest(open_artifact(run / "adapter")) for run in (whole, killed)}
    assert len(digests) == 1

    def of_interest(run: Path) -> list[Any]:
        return [(row["step"], row["loss"], row["gradient_norm"]) for row in steps_of(run)]

    assert of_interest(killed) == of_interest(whole)
    assert moves_of(killed) == moves_of(whole)
    assert len(moves_of(whole)) == 10
    assert len(set(moves_of(whole)[-1]["ranks"].values())) > 2


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_while_ranks_are_measured_loses_nothing(
    tmp_path: Path, tiny_model: Path, number: signal.Signals
) -> None:
    """The round, and the evaluation that follows the same step, are made up for."""
    config = write_config(tmp_path, tiny_model, epochs=3, eval_steps=1, checkpoint_steps=10_000)
    rounds = 'allocation.rounds = 1\nallocation.score = "exact"'
    config.write_text(config.read_text().replace("allocation.rounds = 10", rounds))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    finish(start("run", str(config), "--output", str(whole)))
    (step,) = (row["step"] for row in moves_of(whole))
    process = start("run", str(config), "--output", str(stopped))
    checkpoint = stopped / "checkpoints" / f"step-{step:08d}.safetensors"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGKILL, 130)
    assert not moves_of(stopped), "the round was over before the signal came"
    finish(start("resume", str(stopped)))
    digests = {weights_digest(open_artifact(run / "adapter")) for run in (whole, stopped)}
    assert len(digests) == 1

    def events(run: Path) -> list[Any]:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        return [
            (row["step"], row.get("loss"), row.get("eval_loss")) for row in rows if "step" in row
        ]

    assert events(stopped) == events(whole)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("score", ["gradient", "exact"])
def test_two_processes_train_what_one_trains(tmp_path: Path, tiny_model: Path, score: str) -> None:
    # Without dropout and noise, which each process draws for its own samples.
    config = write_config(tmp_path, tiny_model, neftune_alpha=0.0, epochs=5)
    text = config.read_text().replace("adapter.dropout = 0.1\n", "")
    rounds = f'allocation.rounds = 3\nallocation.score = "{score}"'
    config.write_text(text.replace("allocation.rounds = 10", rounds))
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start("run", str(config), "--output", str(one)))
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    out = finish(start("run", str(config), "--output", str(two), launcher=launcher))
    assert out.splitlines() == [str(two / "adapter")]
    for ours, theirs in zip(steps_of(one), steps_of(two), strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)
        assert theirs["gradient_norm"] == pytest.approx(ours["gradient_norm"], rel=1e-3)
    assert len(steps_of(two)) > 10
    for mine, theirs in zip(moves_of(one), moves_of(two), strict=True):
        for key in ("ranks", "grown", "step"):
            assert mine[key] == theirs[key]
    assert len(moves_of(two)) == 3
    weights = [open_artifact(run / "adapter").read_tensors() for run in (one, two)]
    for (module, *ours), (_, *theirs) in zip(*weights, strict=True):
        for one_factor, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one_factor, other, atol=1e-4, err_msg=module.name)


@pytest.mark.timeout(300)
def test_a_run_that_is_asked_to_stop_writes_a_checkpoint_first(
    tmp_path: Path, tiny_model: Path
) -> None:
    config = write_config(tmp_path, tiny_model, checkpoint_steps=10_000, epochs=400)
    run_folder = tmp_path / "run"
    process = start("run", str(config), "--output", str(run_folder))
    while process.poll() is None and len(steps_of(run_folder)) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    stopped_after = len(steps_of(run_folder))
    assert (
        f"stopped after step {stopped_after}; `rora-train resume {run_folder}` goes on from step-"
        in err
    )
    names = [path.name for path in (run_folder / "checkpoints").iterdir()]
    assert names == [f"step-{stopped_after:08d}.safetensors"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(folder, tiny_model, epochs=1)
    assert main(["run", str(config), "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_a_finished_run_has_nothing_to_resume(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert main(["resume", str(finished)]) == 0
    assert "finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_a_run_into_its_own_folder_is_refused_and_told_how_to_go_on(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = finished.parent / "train.toml"
    assert main(["run", str(config), "--output", str(finished)]) == 2
    assert f"go on with it by `rora-train resume {finished}`" in capsys.readouterr().err


def unfinish(run_folder: Path, copy: Path) -> Path:
    """A copy of a run as it stood after its last checkpoint."""
    for path in run_folder.rglob("*"):
        target = copy / path.relative_to(run_folder)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    rows = (copy / "log.jsonl").read_text().splitlines()
    (copy / "log.jsonl").write_text("\n".join(row for row in rows if "finished" not in row) + "\n")
    return copy


def test_changed_data_or_settings_are_no_resume(
    finished: Path, tmp_path: Path, tiny_model: Path
) -> None:
    run_folder = unfinish(finished, tmp_path / "run")
    base = load_base("tiny", tiny_model, dtype="float32")
    settings = json.loads((run_folder / "config.json").read_text())
    other = write_lines(tmp_path / "other.jsonl", [chat(f"Say {n}!", "x") for n in range(40)])
    for section, key, value, name in (
        ("data", "train", str(other), "the training data"),
        ("data", "eval", str(other), "the held-out data"),
        ("train", "learning_rate", 1e-3, "settings"),
    ):
        changed = settings | {section: settings[section] | {key: value}}
        (run_folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(TrainingError, match=f": {name} changed since the run began"):
            resume(run_folder, base)
        base = load_base("tiny", tiny_model, dtype="float32")
    (run_folder / "config.json").write_text(json.dumps(settings))
    digest = weights_digest(open_artifact(run_folder / "adapter"))
    assert weights_digest(open_artifact(resume(run_folder, base))) == digest


def test_two_processes_do_not_train_into_one_folder(
    finished: Path, tmp_path: Path, tiny_model: Path
) -> None:
    run_folder = unfinish(finished, tmp_path / "run")
    base = load_base("tiny", tiny_model, dtype="float32")
    with owned(run_folder), pytest.raises(ConfigError, match="by another process"):
        resume(run_folder, base)
    assert not (run_folder / ".lock").exists()


def test_a_damaged_checkpoint_is_named(finished: Path, tmp_path: Path, tiny_model: Path) -> None:
    run_folder = unfinish(finished, tmp_path / "run")
    (path,) = (run_folder / "checkpoints").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TrainingError, match=f"{path.name}: no checkpoint of this run"):
        resume(run_folder, load_base("tiny", tiny_model, dtype="float32"))


@pytest.mark.parametrize("place", ["in a weight", "in the state"])
def test_flipped_bytes_in_a_checkpoint_are_noticed(
    finished: Path, tmp_path: Path, tiny_model: Path, place: str
) -> None:
    run_folder = unfinish(finished, tmp_path / "run")
    (path,) = (run_folder / "checkpoints").iterdir()
    content = bytearray(path.read_bytes())
    # Of the JSON within JSON: a digit of num_tokens.
    at = content.index(b'num_tokens\\": ') + 14 if place == "in the state" else -7
    content[at] ^= 0x01 if place == "in the state" else 0x10
    path.write_bytes(content)
    with pytest.raises(TrainingError, match="its bytes changed since it was written"):
        resume(run_folder, load_base("tiny", tiny_model, dtype="float32"))


def test_a_finished_run_whose_adapter_is_damaged_writes_it_again(
    finished: Path, tmp_path: Path, tiny_model: Path
) -> None:
    run_folder = unfinish(finished, tmp_path / "run")
    digest = weights_digest(open_artifact(run_folder / "adapter"))
    with (run_folder / "log.jsonl").open("a") as log:
        log.write('3\n{"finished": true}\n')
    (run_folder / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    resume(run_folder, load_base("tiny", tiny_model, dtype="float32"))
    assert weights_digest(open_artifact(run_folder / "adapter")) == digest


def test_a_folder_without_a_run_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match="the output folder of a run is expected"):
        resume(tmp_path, load_base("tiny", tiny_model, dtype="float32"))
