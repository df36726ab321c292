import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from adapters.errors import DataError
from tests.workloads import chat, write_lines
from trainer.data import Chat, read_chats, render, tokenize_chat
from trainer.model import load_tokenizer

SYSTEM = {"role": "system", "content": "Be short."}
TURNS = [
    SYSTEM,
    {"role": "user", "content": "Hi 1"},
    {"role": "assistant", "content": "Hello <2>"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


@pytest.fixture(scope="module")
def tokenizer(default_model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(default_model)


def masked_text(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every run of tokens with loss."""
    sample = tokenize_chat(messages, tokenizer)
    runs: list[list[int]] = []
    previous = False
    for token, has_loss in zip(sample.token_ids, sample.has_loss, strict=True):
        if has_loss and not previous:
            runs.append([])
        if has_loss:
            runs[-1].append(token)
        previous = has_loss
    return [str(tokenizer.decode(run)) for run in runs]


def test_loss_is_on_the_assistants_words_and_end_token_only(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert masked_text(TURNS, tokenizer) == ["Hello <2><|im_end|>", "So long<|im_end|>"]


def test_the_prompt_is_token_for_token_what_a_server_sends(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    sample = tokenize_chat(TURNS[:3], tokenizer)
    encoded: Any = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True)
    prompt = encoded["input_ids"]
    assert list(sample.token_ids[: len(prompt)]) == prompt
    assert not any(sample.has_loss[: len(prompt)])
    assert sample.has_loss[len(prompt)]


def test_a_later_prompt_is_what_a_server_sends_too(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tokenize_chat(TURNS, tokenizer)
    encoded: Any = tokenizer.apply_chat_template(TURNS[:4], add_generation_prompt=True)
    prompt = encoded["input_ids"]
    assert list(sample.token_ids[: len(prompt)]) == prompt
    assert sample.has_loss[len(prompt)]
    assert not sample.has_loss[len(prompt) - 1]


def test_words_after_a_prompt_are_tokenised_as_part_of_the_whole(default_model: Path) -> None:
    """Tokenizers of Llama 2's kind mark the beginning of a text, which an answer is not."""
    tokenizer: Any = load_tokenizer(default_model)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>"
        "{% else %}[INST]{{ m['content'] }}[/INST]{% endif %}{% endfor %}"
    )
    sample = tokenize_chat(TURNS[1:3], tokenizer)
    joint = tokenizer(render(TURNS[1:3], tokenizer), add_special_tokens=False)["input_ids"]
    assert list(sample.token_ids) == joint
    answer = render(TURNS[1:3], tokenizer).split("[/INST]")[1]
    pieces = tokenizer(answer, add_special_tokens=False)["input_ids"]
    assert pieces != joint[-len(pieces) :], "the control: alone, the answer reads otherwise"


def test_all_turns_together_read_as_the_template_writes_them(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    sample = tokenize_chat(TURNS, tokenizer)
    assert tokenizer.decode(list(sample.token_ids)) == render(TURNS, tokenizer)


def test_a_template_that_rewrites_earlier_turns_is_refused(default_model: Path) -> None:
    """Templates that drop an earlier turn's thoughts would train on text that is never sent."""
    tokenizer = load_tokenizer(default_model)
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ m['content'] if m['role'] != 'assistant' or loop.last else '' }}|{% endfor %}"
    )
    with pytest.raises(DataError, match="turn 5: the chat template changes earlier turns"):
        tokenize_chat(TURNS, tokenizer)


def test_a_model_without_a_template_is_refused(default_model: Path) -> None:
    tokenizer = load_tokenizer(default_model)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        tokenize_chat(TURNS, tokenizer)


def test_a_template_that_raises_is_named(default_model: Path) -> None:
    tokenizer = load_tokenizer(default_model)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses this chat \(roles must alternate\)"):
        tokenize_chat(TURNS, tokenizer)


def test_lines_are_read_with_choices_references_and_limit(tmp_path: Path) -> None:
    lines = [
        chat("q", "it is b", choices=["a", "b"], answer=1),
        chat("q", "x", references=["x", "y"]),
        chat("q", "label", answer=7),  # the index of a class whose name stands in another file
    ]
    path = write_lines(tmp_path / "data.jsonl", list(lines))
    chats = read_chats(path)
    assert [c.answer for c in chats] == [1, None, None]
    assert chats[1].references == ("x", "y")
    assert chats[0].completion == "it is b"
    assert read_chats(path, limit=2) == chats[:2]
    assert isinstance(chats[0], Chat)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON .*one object a line is expected"),
        ("[1]", 'line 2: an object with a list "messages" is expected'),
        ('{"messages": []}', "line 2: the last message is not the assistant's"),
        (json.dumps({"messages": [SYSTEM]}), "the last message is not the assistant's"),
        ('{"messages": [{"role": "bot", "content": ""}]}', r"'bot'.*\"role\" \(system, user"),
        ('{"messages": [{"role": "user", "content": 1}]}', '"content" expected'),
        (json.dumps(chat("q", "b", choices=["a", "b"], answer=0)), "answer 0: an index into the 2"),
        (json.dumps(chat("q", "b", choices=["a", "b"], answer=9)), "answer 9: an index into the 2"),
        (json.dumps(chat("q", "b", choices=["a", "b"], answer=True)), "answer True: an index"),
        (
            json.dumps(chat("q", "b", choices="ab", answer=0)),
            "\"choices\" is 'ab', a list of texts",
        ),
        (json.dumps(chat("q", "b", choices=[1], answer=0)), r"\"choices\" is \[1\], a list of"),
        (json.dumps(chat("q", "b", references=["a", 1])), '"references" is'),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "not JSON"),
        ("9" * 5000, "not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(chat('q', 'a'))}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_chats(path)


def test_many_wrong_lines_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 25)
    with pytest.raises(DataError, match=r"line 10: .*and 15 more lines$"):
        read_chats(path)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_chats(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="can not be read"):
        read_chats(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no line"):
        read_chats(tmp_path / "empty.jsonl")
