"""The three commands as a user meets them: help, exit codes, and one line for a mistake."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import adapters
import adapters.cli
import rora_serve
import rora_serve.cli
import trainer
import trainer.cli
from tests.workloads import chat, write_lines

COMMANDS = {
    "rora-adapters": adapters.cli.main,
    "rora-serve": rora_serve.cli.main,
    "rora-train": trainer.cli.main,
}
HEAVY = {"numba", "peft", "tokenizers", "torch", "transformers", "vllm"}


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    data = write_lines(tmp_path / "data.jsonl", [chat(f"Say {n}", f"{n}") for n in range(6)])
    path = tmp_path / "config.toml"
    path.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path / "run"}"\n'
        f'data.train = "{data}"\ndata.eval = "{data}"\n'
        "adapter.rank = 2\ntrain.learning_rate = 1e-2\n"
    )
    return path


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last thing on stderr, after progress; nothing may be on stdout."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


def test_the_packages_are_ours() -> None:
    """`adapters` and `trainer` are names of other projects' packages too."""
    root = Path(__file__).parents[1]
    for package in (adapters, trainer, rora_serve):
        assert Path(str(package.__file__)).parents[1] == root


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["store", "add", "--help"], ["validate", "--help"]],
)
def test_help_loads_nothing_heavy(command: str, arguments: list[str]) -> None:
    """What makes help answer at once."""
    module = COMMANDS[command].__module__
    code = (
        f"import sys; from {module} import main\n"
        "try:\n"
        f"    main({arguments!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stderr.splitlines()[-1] == "[]"


def test_train_validate_evaluate_and_store_work_together(
    config: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trainer.cli.main(["validate", str(config)]) == 0
    assert "⟦0<|im_end|>⟧" in capsys.readouterr().out
    assert trainer.cli.main(["run", str(config), "--adapter.rank=3", "--train.epochs", "2"]) == 0
    folder = capsys.readouterr().out.strip()
    assert folder == str(tmp_path / "run" / "adapter")
    data = str(tmp_path / "data.jsonl")
    arguments = ["evaluate", folder, "--data", data, "--model", str(tiny_model), "--json"]
    assert trainer.cli.main(arguments) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["adapter"]["loss"] < measured["base"]["loss"]
    assert measured["adapter"]["num_samples"] == 6
    assert trainer.cli.main([*arguments[:-1], "--limit", "2"]) == 0
    assert capsys.readouterr().out.startswith("2 samples, answers by exact-match")
    store = ["--store", str(tmp_path / "store")]
    assert adapters.cli.main(["store", "add", folder, "--name", "x", *store]) == 0
    added = capsys.readouterr().out.strip()
    assert adapters.cli.main(["store", "list", "--json", *store]) == 0
    (listed,) = json.loads(capsys.readouterr().out)
    assert added == f"x@sha256:{listed['aliases']['latest']}"
    assert adapters.cli.main(["store", "list", *store]) == 0
    assert "sha256:" in capsys.readouterr().out


def test_flags_are_spelt_with_hyphens_or_as_in_toml(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--train.batch_tokens", "--train.batch-tokens"):
        assert trainer.cli.main(["validate", str(config), flag, "64"]) == 0
        assert "at most 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter.rank", "0"], "adapter.rank: found '0', input should be greater than or equal"),
        (
            ["--train.learning_rate", "foo"],
            "train.learning_rate: found 'foo', a number above 0 or \"auto\" is expected",
        ),
        (["--adapter.rank", "25"], "adapter.rank: 25 is above 24, the smaller side of"),
        (["--adapter.target-modules", "nope"], "no linear layer matches 'nope'"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--train.schedule", "cosine", "--train.dropout", "1"], None),
        (["--model", "/nowhere"], "model '/nowhere': no such folder"),
        (["--adapter.alpha", "inf"], "adapter.alpha: found 'inf'"),
        (["--train.epochs", "inf"], "train.epochs: found 'inf'"),
        (["--train.seed", str(2**64)], "train.seed: found"),
        (["--data", "{"], "flags: "),
        (["--output", "/dev/null/x"], "/dev/null/x can not be made"),
    ],
)
@pytest.mark.parametrize("command", ["run", "validate"])
def test_a_wrong_setting_is_one_line(
    config: Path,
    command: str,
    flags: list[str],
    message: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if message is None:  # argparse's own
        with pytest.raises(SystemExit) as caught:
            trainer.cli.main([command, str(config), *flags])
        assert caught.value.code == 2
        return
    assert trainer.cli.main([command, str(config), *flags]) in (1, 2)
    line = one_line(capsys)
    assert line.startswith("rora-train: ")
    assert message in line


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "output = 'x'\nadapter.rnk = 4",
            "adapter.rnk: unknown key; nearest known key: adapter.ra",
        ),
        ("output = 'x'", "data: missing, a value is expected"),
        (
            "output = 'x'\ndata.train = 'd'\nallocation.enabled = true",
            "c.toml: train.epochs is 1, at least allocation.warmup_epochs + rounds * "
            "epochs_per_round = 3 is expected",
        ),
        ("output = ", "not TOML"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    assert trainer.cli.main(["run", str(path)]) == 2
    line = one_line(capsys)
    assert str(path) in line
    assert message in line


def test_every_mistake_in_a_file_is_reported_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.toml"
    path.write_text("adapter.rank = -1\ntrain.sede = 1\n")
    assert trainer.cli.main(["run", str(path)]) == 2
    line = one_line(capsys)
    assert all(part in line for part in ("output: missing", "adapter.rank: found -1", "train.seed"))


def test_validate_reports_mistakes_of_config_and_data_together(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "data.jsonl").open("a") as file:
        file.write("no json\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "old").write_text("")
    assert trainer.cli.main(["validate", str(config), "--adapter.rank", "99"]) == 2
    line = one_line(capsys)
    assert all(part in line for part in ("line 7: not JSON", "holds something already", "99 is"))


def test_a_missing_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.cli.main(["run", "nowhere.toml"]) == 2
    assert "nowhere.toml: no such file, a TOML configuration is expected" in one_line(capsys)


def test_a_model_folder_without_weights_is_one_line(
    config: Path, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert trainer.cli.main(["run", str(config), "--model", str(tmp_path / "bare")]) == 1
    assert "no *.safetensors in it" in one_line(capsys)
    assert rora_serve.cli.main(["--model", str(tmp_path / "bare"), "--port", "0"]) == 1
    assert "no *.safetensors in it" in one_line(capsys)


def test_a_store_that_is_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").write_text("")
    assert rora_serve.cli.main(["--store", str(tmp_path / "store"), "--port", "0"]) == 2
    assert "a file, a folder made by rora-adapters is expected" in one_line(capsys)


def test_a_port_in_use_is_one_line_before_anything_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert rora_serve.cli.main(["--port", str(port)]) == 2
    assert f"--port {port}: Address already in use, a free address is expected" in one_line(capsys)


def test_an_option_that_is_ours_is_not_taken_for_vllm(tiny_model: Path) -> None:
    own = ["--model", str(tiny_model), "--port", "0", "--store", str(tiny_model / "store"), "--"]
    result = subprocess.run(
        [str(Path(sys.executable).with_name("rora-serve")), *own, "--max_loras=3"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert "--max-loras: set by rora-serve itself" in result.stderr.splitlines()[-1]


def test_an_adapter_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = ["--store", str(tmp_path / "store")]
    assert adapters.cli.main(["store", "add", str(tmp_path), "--name", "x", *store]) == 1
    assert "no adapter_config.json" in one_line(capsys)
    assert adapters.cli.main(["store", "add", str(tmp_path), "--name", "../x", *store]) == 2
    assert "adapter name '../x'" in one_line(capsys)
    assert adapters.cli.main(["store", "list", *store]) == 0
    assert "no adapter yet" in one_line(capsys)
