from pathlib import Path

import pytest
import torch

from trainer.data import Chat, render
from trainer.evaluate import answer_is_right, evaluate
from trainer.model import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base("tiny", tiny_model, dtype="float32")


def ask(base: BaseModel, question: str) -> str:
    """Greedy generation one token at a time, without cache, padding or batch."""
    messages = ({"role": "user", "content": question},)
    text = render(messages, base.tokenizer, add_generation_prompt=True)
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    with torch.no_grad():
        while ids[-1] != base.tokenizer.eos_token_id or len(ids) == start:
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(base.tokenizer.decode(ids[start:-1]))


def make_chat(question: str, completion: str, /, **more: object) -> Chat:
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "content": completion},
    )
    return Chat(messages, **more)  # type: ignore[arg-type]


def test_exact_match_counts_what_greedy_generation_says(default_model: Path) -> None:
    """The model's own answers are right, in one padded batch of unlike lengths; others are not."""
    base = load_base("smollm2", default_model, dtype="float32")
    questions = ["What is the capital of France?", "Name the capital of Italy, in one word."]
    right = [make_chat(question, ask(base, question)) for question in questions]
    wrong = [make_chat("Hi", "No."), make_chat(questions[0], "The capital of France is Rome.")]
    found = evaluate(base, [*right, *wrong], batch_tokens=400, progress=lambda _: None)
    assert (found.by, found.num_samples, found.accuracy) == ("exact-match", 4, 0.5)
    alone = evaluate(base, right, batch_tokens=1, progress=lambda _: None)
    assert alone.accuracy == 1.0


def test_the_most_likely_choice_is_the_answer(base: BaseModel) -> None:
    """The oracle asks for each choice's log-likelihood alone, without padding or batch."""
    choices = ("yes", "no", "maybe, if the weather is fine", "x")
    scores = []
    for choice in choices:
        prompt = render(
            ({"role": "user", "content": "Well?"},), base.tokenizer, add_generation_prompt=True
        )
        start = base.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rest = base.tokenizer(choice + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            log_probs = base.model(torch.tensor([start + rest])).logits[0].log_softmax(-1)
        scores.append(
            sum(float(log_probs[len(start) + i - 1, token]) for i, token in enumerate(rest))
        )
    best = max(range(len(choices)), key=scores.__getitem__)
    chats = [
        make_chat("Well?", choices[answer], choices=choices, answer=answer)
        for answer in range(len(choices))
    ]
    found = evaluate(base, chats, batch_tokens=200, progress=lambda _: None)
    assert found.by == "choice"
    assert found.accuracy == 0.25
    alone = evaluate(base, [chats[best]], batch_tokens=200, progress=lambda _: None)
    assert alone.accuracy == 1.0


def test_white_space_at_the_ends_and_any_reference_count_as_right() -> None:
    one = make_chat("q", "a b", references=("a b", "c"))
    assert answer_is_right(" a b\n", one)
    assert answer_is_right("c", one)
    assert not answer_is_right("a  b", one)
    assert not answer_is_right("", one)
