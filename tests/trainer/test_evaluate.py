import json
from pathlib import Path

import pytest
import torch

import trainer.cli
from tests.workloads import write_lines
from trainer.data import Chat, PromptCompletion, Text, render
from trainer.evaluate import answer_is_right, evaluate
from trainer.loss import ModelLoss
from trainer.model import BaseModel, load_base


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> BaseModel:
    return load_base("tiny", tiny_model, dtype="float32")


def padded(base: BaseModel) -> ModelLoss:
    return ModelLoss(base, packs=False, shares_prefix=False, plain_head=True)


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
    found = evaluate(padded(base), [*right, *wrong], batch_tokens=400, progress=lambda _: None)
    assert (found.by, found.num_samples, found.accuracy) == ("exact-match", 4, 0.5)
    alone = evaluate(padded(base), right, batch_tokens=1, progress=lambda _: None)
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
    found = evaluate(padded(base), chats, batch_tokens=200, progress=lambda _: None)
    assert found.by == "choice"
    assert found.accuracy == 0.25
    alone = evaluate(padded(base), [chats[best]], batch_tokens=200, progress=lambda _: None)
    assert alone.accuracy == 1.0


def test_white_space_at_the_ends_and_any_reference_count_as_right() -> None:
    one = make_chat("q", "a b", references=("a b", "c"))
    assert answer_is_right(" a b\n", one)
    assert answer_is_right("c", one)
    assert not answer_is_right("a  b", one)
    assert not answer_is_right("", one)


def log_likelihood(base: BaseModel, prompt: list[int], rest: list[int]) -> float:
    """The oracle: one unpadded forward, token by token."""
    with torch.no_grad():
        log_probs = base.model(torch.tensor([prompt + rest])).logits[0].log_softmax(-1)
    return sum(float(log_probs[len(prompt) + i - 1, token]) for i, token in enumerate(rest))


def test_a_prompts_completion_is_judged_without_a_chat_template(base: BaseModel) -> None:
    choices = (" yes", " no", " x y z")
    ids = base.tokenizer("Is it so?")["input_ids"]
    ends = [base.tokenizer(choice)["input_ids"] + [2] for choice in choices]
    scores = [log_likelihood(base, ids, end) for end in ends]
    best = max(range(len(choices)), key=scores.__getitem__)
    asked = [
        PromptCompletion("Is it so?", choices[answer], choices=choices, answer=answer)
        for answer in range(len(choices))
    ]
    found = evaluate(padded(base), asked, batch_tokens=64, progress=lambda _: None)
    assert found.by == "choice"
    assert found.accuracy == pytest.approx(1 / 3)
    alone = evaluate(padded(base), [asked[best]], batch_tokens=64, progress=lambda _: None)
    assert alone.accuracy == 1.0
    assert alone.loss == pytest.approx(-scores[best] / len(ends[best]), abs=1e-4)


def test_a_prompts_completion_is_generated_from_the_raw_prompt(default_model: Path) -> None:
    base = load_base("smollm2", default_model, dtype="float32")
    ids = base.tokenizer("The capital of France is")["input_ids"]
    start = len(ids)
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(base.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert "Paris" in base.tokenizer.decode(ids[start:])
    # Nothing ends this model's answer to raw text, so that the whole of it is never right.
    asked = [PromptCompletion("The capital of France is", " Paris.")]
    found = evaluate(padded(base), asked, batch_tokens=64, progress=lambda _: None)
    assert (found.by, found.accuracy) == ("exact-match", 0.0)


def test_texts_have_a_loss_and_no_accuracy(base: BaseModel) -> None:
    ids = [*base.tokenizer("Once upon a time")["input_ids"], 2]
    done: list[int] = []
    found = evaluate(
        padded(base), [Text("Once upon a time")], batch_tokens=64, progress=done.append
    )
    assert (found.accuracy, found.by, found.num_samples, done) == (None, None, 1, [1])
    expected = -log_likelihood(base, ids[:1], ids[1:]) / (len(ids) - 1)
    assert found.loss == pytest.approx(expected, abs=1e-4)


def test_the_table_of_texts_has_no_accuracy(
    adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "texts.jsonl", [{"text": "Once upon a time"}, {"text": "b c"}])
    arguments = ["evaluate", str(adapter), "--data", str(data), "--model", str(tiny_model)]
    assert trainer.cli.main(arguments) == 0
    first, _, *rows = capsys.readouterr().out.splitlines()
    assert first == "2 samples"
    assert [row.split()[0::2] for row in rows] == [["base", "-"], ["adapter", "-"]]
    assert trainer.cli.main([*arguments, "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["base"]["accuracy"] is measured["base"]["by"] is None
