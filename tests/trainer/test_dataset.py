import hashlib
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from adapters.errors import ConfigError, DataError
from adapters.settings import read_settings
from tests.workloads import chat, write_lines
from trainer.config import DataSettings, LoopSettings, TrainConfig
from trainer.data import Chat, Sample, Text, tokenize
from trainer.dataset import TrainingData, load_data, local_file, truncate
from trainer.model import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(default_model)


def load(
    folder: Path, tokenizer: PreTrainedTokenizerBase, /, *, max_sample_tokens: int = 64, **data: Any
) -> TrainingData:
    """Load lines of data.train and, by name, of the sets of data.eval."""
    settings = {
        key: {name: write_lines(folder / f"{name}.jsonl", lines) for name, lines in value.items()}
        if isinstance(value, dict)
        else write_lines(folder / f"{key}.jsonl", value)
        if isinstance(value, list)
        else value
        for key, value in data.items()
    }
    config = TrainConfig(
        output=folder / "run",
        data=DataSettings(**settings),
        train=LoopSettings(max_sample_tokens=max_sample_tokens),
    )
    return load_data(config, tokenizer, max_positions=None)


def text(num_tokens: int, word: str = "a") -> dict[str, str]:
    """A text of so many tokens, its end token among them."""
    return {"text": " ".join([word] * (num_tokens - 1))}


def test_long_samples_are_truncated_at_the_end_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines = [text(9), text(10), text(11), text(17)]
    data = load(tmp_path, tokenizer, train=lines, max_sample_tokens=10)
    assert [len(sample) for sample in data.samples] == [9, 10, 10, 10]
    assert (data.num_truncated, data.num_cut_tokens, data.num_left_out) == (2, 1 + 7, 0)
    whole = tokenize(Text(lines[3]["text"]), tokenizer)
    assert data.samples[3] == Sample(whole.token_ids[:10], whole.has_loss[:10])
    assert data.samples[1].token_ids[-1] == tokenizer.eos_token_id
    assert data.samples[2].token_ids[-1] != tokenizer.eos_token_id
    assert data.remarks() == ["2 samples truncated to 10 tokens, 8 tokens cut away"]


def test_a_sample_whose_answer_is_cut_away_is_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """A prompt of as many tokens as are kept leaves nothing to learn; one less leaves a token."""
    lines: list[object] = [
        {"prompt": "a a a a", "completion": " b b"},
        {"prompt": "a a a a a", "completion": " b b"},
    ]
    data = load(tmp_path, tokenizer, train=lines, max_sample_tokens=5)
    (kept,) = data.samples
    assert kept.loss_places == (4,)
    assert (data.num_truncated, data.num_cut_tokens, data.num_left_out) == (1, 2, 1)
    with pytest.raises(DataError, match=r"of all 2 samples lie beyond the first 3; ra"):
        load(tmp_path, tokenizer, train=lines, max_sample_tokens=3)


@given(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=9),
    st.integers(2, 9),
)
def test_every_token_is_kept_cut_or_left_out(masks: list[list[bool]], max_tokens: int) -> None:
    samples = [
        Sample(tuple(range(len(mask))), (False, *mask[1:], True)[: len(mask)]) for mask in masks
    ]
    usable = [sample for sample in samples if any(sample.has_loss)]
    cut = truncate(usable, max_tokens)
    lost = [s for s in usable if not any(s.has_loss[:max_tokens])]
    assert cut.num_left_out == len(lost) == len(usable) - len(cut.samples)
    assert sum(map(len, cut.samples)) + cut.num_cut_tokens + sum(map(len, lost)) == sum(
        map(len, usable)
    )
    assert all(sample.loss_places and len(sample) <= max_tokens for sample in cut.samples)
    assert cut.num_truncated == sum(len(s) > max_tokens for s in usable) - len(lost)


def test_duplicates_are_counted_and_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lines: list[object] = [
        chat("q", "a"),
        chat("q", "b"),
        *[chat("q", "a", id=n) for n in range(4)],
    ]
    data = load(tmp_path, tokenizer, train=lines)
    assert len(data.samples) == 6
    assert data.num_duplicates == 4
    assert data.remarks() == [
        "4 duplicates in data.train: line 3 repeats line 1, line 4 repeats line 1, line 5 repeats "
        "line 1, and 1 more"
    ]


def test_samples_that_only_truncation_makes_alike_are_no_duplicates(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, tokenizer, train=[text(11), text(12)], max_sample_tokens=10)
    assert data.samples[0] == data.samples[1]
    assert data.num_duplicates == 0


def test_held_out_sets_have_names_a_limit_and_leaks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = [chat("q", str(n)) for n in range(4)]
    held_out = {
        "one": [chat("q", "x"), chat("q", "3"), chat("q", "2")],
        "two": [chat("q", "y"), chat("r", "3")],
    }
    data = load(tmp_path, tokenizer, train=train, eval=held_out, eval_limit=2)
    assert {name: len(examples) for name, examples in data.eval_sets.items()} == {
        "one": 2,
        "two": 2,
    }
    assert data.leaks == {"one": ((2, 4),), "two": ()}
    assert data.remarks() == [
        "leak: 1 of 2 held-out lines of set one are in data.train too: line 2 is line 4 there"
    ]
    alone = load(tmp_path, tokenizer, train=train, eval=held_out["two"])
    assert list(alone.eval_sets) == ["default"]
    assert isinstance(alone.eval_sets["default"][0], Chat)
    assert load(tmp_path, tokenizer, train=train).eval_sets == {}


def test_the_digest_is_that_of_the_training_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(tmp_path, tokenizer, train=[text(4)])
    assert data.data_sha256 == hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()


def test_mistakes_of_all_files_and_stages_are_told_at_once_in_order(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = [chat("q", "a"), {"messages": []}, text(3), chat("q", "b")]
    held_out = {"one": [{"text": "<|im_end|>"}, {"text": 1}], "two": [[]]}
    with pytest.raises(DataError) as caught:
        load(tmp_path, tokenizer, train=train, eval=held_out)
    message = str(caught.value)
    parts = [
        "train.jsonl: line 2: no turn",
        "line 3: a text, but line 1 is a chat",
        "one.jsonl: line 1: no token of 1 carries loss",
        'line 2: "text" is 1',
        "two.jsonl: line 1: [] is no object",
    ]
    places = [message.index(part) for part in parts]
    assert places == sorted(places)
    assert "\n" not in message


def test_what_the_template_refuses_is_named_by_its_line(
    tmp_path: Path, default_model: Path
) -> None:
    tokenizer = load_tokenizer(default_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no b') if m['content'] == 'b' else m['content']"
        " }}{% endfor %}"
    )
    (tmp_path / "data.jsonl").touch()
    with pytest.raises(DataError, match=r"line 2: the chat template refuses this chat \(no b\)"):
        load(tmp_path, tokenizer, train=[chat("q", "a"), chat("b", "a")])


@pytest.mark.parametrize(
    "address",
    [
        "hf://datasets/owner/name",
        "hf://datasets/owner/name/",
        "hf://datasets/name/train.jsonl",
        "hf://models/owner/name/train.jsonl",
        "hf://owner/name/train.jsonl",
        "hf://datasets/owner/name/train.parquet",
        "hf://datasets/owner/name@/train.jsonl",
        "hf://datasets/owner@main/name/train.jsonl",
    ],
)
def test_an_address_of_another_form_is_refused(
    address: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = r"not an address of a JSON-lines file on the hub, hf://datasets/OWNER/NAME\[@REV"
    with pytest.raises(DataError, match=expected):
        load(tmp_path, tokenizer, train=address)


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("hf://datasets/o/n/train.jsonl", ("o/n", "train.jsonl", None)),
        ("hf://datasets/o/n@v1.0/a/b/c.jsonl", ("o/n", "a/b/c.jsonl", "v1.0")),
        ("hf://datasets/o/n@refs%2Fpr%2F1/x.json", ("o/n", "x.json", "refs/pr/1")),
        ("hf://datasets/o/n/at@here/x.jsonl", ("o/n", "at@here/x.jsonl", None)),
    ],
)
def test_a_file_of_the_hub_is_asked_for_by_its_parts(
    address: str,
    asked: tuple[str, str, str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def download(repository: str, path: str, *, repo_type: str, revision: str | None) -> str:
        calls.append((repository, path, revision))
        assert repo_type == "dataset"
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert local_file(address) == tmp_path
    assert calls == [asked]


def test_a_hub_that_gives_nothing_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(
        DataError, match=r"o/n/x\.jsonl: the Hugging.* not give it \(no route\); ch"
    ):
        local_file("hf://datasets/o/n/x.jsonl")


def test_an_address_stays_as_it_was_written_in_the_resolved_config(tmp_path: Path) -> None:
    """pathlib would make one slash of two."""
    path = tmp_path / "c.toml"
    path.write_text(
        'output = "run"\ndata.train = "hf://datasets/o/n/x.jsonl"\ndata.eval.a = "b.jsonl"\n'
    )
    config = read_settings(TrainConfig, path, {})
    assert config.data.train == "hf://datasets/o/n/x.jsonl"
    assert config.data.eval_sets == {"a": "b.jsonl"}
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    path.write_text('output = "run"\ndata.train = "x"\ndata.eval."a b" = "b.jsonl"\n')
    with pytest.raises(ConfigError, match=r"the set's name 'a b' is none of letters, digits"):
        read_settings(TrainConfig, path, {})


def test_held_out_samples_that_are_too_long_are_left_out_and_told(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = load(
        tmp_path, tokenizer, train=[text(5)], eval=[text(6), text(30), text(7)],
        max_sample_tokens=10,
    )  # fmt: skip
    assert [len(examples) for examples in data.eval_sets.values()] == [2]
    assert "1 samples of set default left out: longer than 10 tokens" in data.remarks()
    with pytest.raises(DataError, match="all 1 samples are longer than 10 tokens"):
        load(tmp_path, tokenizer, train=[text(5)], eval=[text(30)], max_sample_tokens=10)


def test_an_empty_prompt_is_refused_where_an_answer_is_generated(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    empty = {"prompt": "", "completion": "abc"}
    assert load(tmp_path, tokenizer, train=[empty]).samples
    with pytest.raises(DataError, match="line 1: the prompt is empty"):
        load(tmp_path, tokenizer, train=[empty], eval=[empty])
