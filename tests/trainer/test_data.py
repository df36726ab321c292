from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase

from adapters.errors import DataError
from trainer.data import (
    Chat,
    PromptCompletion,
    Text,
    prompt_token_ids,
    render,
    tokenize,
    tokenize_chat,
)
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


def with_begin_token(default_model: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, adding a begin token by default as Llama's does."""
    tokenizer: Any = load_tokenizer(default_model)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair=None, special_tokens=[("<|endoftext|>", 0)]
    )
    return tokenizer  # type: ignore[no-any-return]


def test_a_completion_and_its_end_token_carry_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    sample = tokenize(PromptCompletion("Say red:", " red, red"), tokenizer)
    pieces = ["Say", " red", ":", " red", ",", " red", "<|im_end|>"]
    assert list(sample.token_ids) == tokenizer.convert_tokens_to_ids(
        [piece.replace(" ", "Ġ") for piece in pieces]
    )
    assert sample.has_loss == (False, False, False, True, True, True, True)
    assert sample.loss_places == (3, 4, 5, 6)


def test_a_completion_that_ends_itself_gets_no_second_end_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ended = tokenize(PromptCompletion("Say red:", " red<|im_end|>"), tokenizer)
    assert ended == tokenize(PromptCompletion("Say red:", " red"), tokenizer)


def test_a_token_that_would_join_prompt_and_completion_is_split(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A server sends the prompt alone, with its last space as a token."""
    sample = tokenize(PromptCompletion("Say ", "red"), tokenizer)
    assert [tokenizer.decode([token]) for token in sample.token_ids] == [
        "Say", " ", "red", "<|im_end|>",
    ]  # fmt: skip
    assert sample.has_loss == (False, False, True, True)


def test_raw_prompts_begin_with_the_token_that_the_tokenizer_adds(default_model: Path) -> None:
    tokenizer = with_begin_token(default_model)
    sample = tokenize(PromptCompletion("Say red:", " red"), tokenizer)
    assert sample.token_ids[0] == 0
    assert sample.token_ids.count(0) == 1
    assert sample.loss_places == (4, 5)
    joined = tokenize(PromptCompletion("Say ", "red"), tokenizer)
    assert (joined.token_ids[0], joined.token_ids.count(0)) == (0, 1)
    unasked = tokenize(PromptCompletion("", "red"), tokenizer)
    assert (unasked.token_ids[0], unasked.loss_places) == (0, (1, 2))
    assert tokenize(Text("red"), tokenizer) == unasked
    # A chat template writes its own.
    assert tokenize(Chat(tuple(TURNS)), tokenizer).token_ids.count(0) == 0


def test_a_text_carries_loss_on_all_but_its_first_token(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    sample = tokenize(Text("Say red"), tokenizer)
    assert tokenizer.decode(list(sample.token_ids)) == "Say red<|im_end|>"
    assert sample.has_loss == (False, True, True)
    assert tokenize(Text("Say red<|im_end|>"), tokenizer) == sample


def test_a_sample_without_loss_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="no token of 1 carries loss, an answer"):
        tokenize(Text("<|im_end|>"), tokenizer)


def test_given_turns_carry_no_loss(tokenizer: PreTrainedTokenizerBase) -> None:
    """The prompt of a list of turns may hold the assistant's, which nobody asks the model for."""
    sample = tokenize(Chat(tuple(TURNS), num_given=4), tokenizer)
    whole = tokenize(Chat(tuple(TURNS)), tokenizer)
    assert sample.token_ids == whole.token_ids
    assert tokenizer.decode([sample.token_ids[i] for i in sample.loss_places]) == (
        "So long<|im_end|>"
    )
    assert set(sample.loss_places) < set(whole.loss_places)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(prompt=WORDS | st.just(""), completion=WORDS, as_chat=st.booleans())
def test_masks_begin_where_the_prompt_that_a_server_sends_ends(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, as_chat: bool
) -> None:
    messages = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": completion},
    )
    # Some control characters are no token at all, and an end alone follows nothing.
    assume(as_chat or tokenizer(prompt + completion)["input_ids"])
    example = Chat(messages) if as_chat else PromptCompletion(prompt, completion)
    sent = prompt_token_ids(example, tokenizer)
    sample = tokenize(example, tokenizer)
    assert list(sample.token_ids[: len(sent)]) == sent
    assert not any(sample.has_loss[: len(sent)])
    assert sample.loss_places[0] == max(len(sent), 1)
    if not as_chat:
        assert all(sample.has_loss[max(len(sent), 1) :])
        assert sample.token_ids[-1] == tokenizer.eos_token_id


@settings(max_examples=100, deadline=None)
@given(text=WORDS)
def test_no_text_carries_loss_on_its_first_token(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    assume(tokenizer(text)["input_ids"])
    sample = tokenize(Text(text), tokenizer)
    assert sample.loss_places == tuple(range(1, len(sample)))
    assert sample.token_ids[-1] == tokenizer.eos_token_id
