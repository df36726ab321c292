from pathlib import Path
from typing import Any

import pytest

import trainer.cli
from adapters.errors import ConfigError
from tests.workloads import chat, write_lines
from trainer.config import (
    AdapterSettings,
    AllocationSettings,
    DataSettings,
    LoopSettings,
    TrainConfig,
)
from trainer.validate import validate


def report(
    tmp_path: Path, model: Path, /, *, lines: list[Any], bold: bool = False, **loop: Any
) -> list[str]:
    train = write_lines(tmp_path / "data.jsonl", lines)
    held_out = write_lines(tmp_path / "test.jsonl", [lines[0], chat("other", "x")])
    config = TrainConfig(
        model=str(model),
        output=tmp_path / "run",
        data=DataSettings(train=train, eval={"near": held_out}),
        adapter=AdapterSettings(rank=2),
        train=LoopSettings(**loop),
    )
    return validate(config, model, bold=bold).splitlines()


def test_the_report_counts_what_the_run_will_see(tmp_path: Path, tiny_model: Path) -> None:
    """Texts of 3 to 12 tokens, the end token among them, of at most 10."""
    lines = [{"text": " ".join(["a"] * n)} for n in range(2, 12)] + [{"text": "a a"}]
    write_lines(tmp_path / "near.jsonl", [{"text": "a a a"}, {"text": "b"}])
    config = TrainConfig(
        model=str(tiny_model),
        output=tmp_path / "run",
        data=DataSettings(
            train=write_lines(tmp_path / "data.jsonl", list(lines)),
            eval={"near": tmp_path / "near.jsonl"},
        ),
        adapter=AdapterSettings(rank=2),
        train=LoopSettings(max_sample_tokens=10, batch_tokens=30),
    )
    facts, shown = validate(config, tiny_model).split("\n\n", 1)
    num_tokens = sum(range(3, 11)) + 10 + 10 + 3
    assert facts.splitlines() == [
        f"samples     11 of {tmp_path / 'data.jsonl'}",
        f"tokens      {num_tokens}, {num_tokens - 11} of them carry loss (85.3%)",
        "length      median 7, 95% 10, longest 10 tokens",
        "truncated   2 samples to 10 tokens, 3 tokens cut away",
        "left out    0 samples, for no token with loss was left",
        "duplicates  1 (line 11 repeats line 1)",
        facts.splitlines()[6],
        "held out    near: 2 samples, too long and left out 0, also in data.train 1 "
        "(line 1 is line 2 there)",
    ]
    assert facts.splitlines()[6].endswith("an epoch, of at most 30 tokens")
    assert shown.startswith("one batch of ")
    assert "\n\na⟦ a<|im_end|>⟧\n" in shown


def test_allocation_is_planned_without_a_model(tmp_path: Path, tiny_model: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", [{"text": f"{n} a"} for n in range(30)])

    def report_of(**allocation: Any) -> str:
        settings = {"enabled": True, "rounds": 2, "epochs_per_round": 0.5, "score_samples": 10}
        config = TrainConfig(
            model=str(tiny_model),
            output=tmp_path / "run",
            data=DataSettings(train=data),
            adapter=AdapterSettings(rank=2),
            allocation=AllocationSettings(**(settings | allocation)),
            train=LoopSettings(batch_tokens=16, epochs=2),
        )
        return validate(config, tiny_model)

    expected = (
        "allocation  7 of 28 ranks move in each of 2 rounds, after steps 5 to 8; gradient scores "
        "on 10 samples set apart"
    )
    assert expected in report_of().splitlines()
    with pytest.raises(ConfigError, match="ranks_per_round: 28 moves 28 ranks, fewer than the 28 "):
        report_of(ranks_per_round=28)
    with pytest.raises(ConfigError, match="30 different samples, at least 32 are expected"):
        report_of(score_samples=16)


def test_one_batch_is_shown_first_in_full_then_short(tmp_path: Path, tiny_model: Path) -> None:
    lines = [chat("What?\n" * 30, "yes"), *[chat("What? " * 30, f"no {n}") for n in range(6)]]
    *_, last = shown = report(tmp_path, tiny_model, lines=lines, batch_tokens=4096)
    start = shown.index("one batch of 7 samples, what carries loss between ⟦ and ⟧:")
    assert shown[start + 1 :].count("What?") == 30, "in full"
    assert sum("⟦yes<|im_end|>⟧" in line for line in shown) == 1
    short = [line for line in shown if "⟦no" in line]
    assert len(short) == 3
    assert all(len(line) < 150 and "…" in line for line in short)
    assert short[0].endswith("⟦no 0<|im_end|>⟧⏎")
    assert last == "and 3 more samples"
    assert "\x1b" not in "".join(shown)


def test_loss_is_bold_on_a_terminal_and_data_can_not_steer_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    lines = [chat("clear \x1b[2J", "yes"), chat("q", "a")]
    shown = "\n".join(report(tmp_path, tiny_model, lines=lines, bold=True))
    assert "\x1b[1m⟦yes<|im_end|>⟧\x1b[22m" in shown
    assert "clear \\x1b[2J" in shown
    assert shown.count("\x1b") == 4


def test_long_conversations_are_cut_after_a_few_turns(tmp_path: Path, tiny_model: Path) -> None:
    turns = chat("q", "a")["messages"]
    assert isinstance(turns, list)
    lines = [chat("first", "a"), {"messages": turns * 8}]
    shown = report(tmp_path, tiny_model, lines=lines, batch_tokens=4096)
    assert shown[-1].endswith(" …")
    assert shown[-1].count("⟦") == 3


def test_sets_are_named_by_flags_too(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "data.jsonl", [chat("q", "a")])
    config = tmp_path / "c.toml"
    config.write_text(
        f'model = "{tiny_model}"\noutput = "{tmp_path / "run"}"\ndata.train = "{data}"\n'
        f'data.eval.first = "{data}"\nadapter.rank = 2\n'
    )
    for flags, told in (
        ([], ["first"]),
        (["--data.eval", str(data)], ["default"]),
        (["--data.eval", f"second={data}"], ["first", "second"]),
        (["--data.eval", "none"], ["none"]),
    ):
        assert trainer.cli.main(["validate", str(config), *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        held_out = [line for line in lines if line.startswith("held out")]
        assert [line.split()[2].rstrip(":") for line in held_out] == told
