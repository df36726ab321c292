"""Held-out loss, and accuracy of answers: choice by log-likelihood, else greedy generation."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from trainer.batching import split_step
from trainer.data import Example, Question, Sample, Text, prompt_token_ids, tokenize
from trainer.inject import adapters_off
from trainer.lora_linear import LoraLinear
from trainer.loss import ModelLoss
from trainer.model import BaseModel

Progress = Callable[[int], object]
# An answer longer than the longest right one by this much is wrong anyway.
_SPARE_NEW_TOKENS = 8


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out examples.

    Args:
        loss: mean negative log-likelihood of the tokens with loss, in nats.
        accuracy: share of examples answered right, 0 to 1; None for texts, which ask nothing.
        by: how an answer was taken: "choice" (the most likely one) or "exact-match" (greedy
            generation); None for texts.
        num_samples: examples evaluated.
    """

    loss: float
    accuracy: float | None
    by: Literal["choice", "exact-match"] | None
    num_samples: int


def evaluate(
    loss: ModelLoss,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    progress: Progress,
) -> Evaluation:
    """Measure loss and accuracy of `loss.base`, with whatever adapter is in it.

    Args:
        examples: at least one; with a text among them there is no accuracy, else it is by choice if
            all have choices, and by exact match if not.
        batch_tokens: tokens of one forward, padding included.
        progress: called with the number of examples done since the last call.
    """
    base = loss.base
    was_training = base.model.training
    base.model.eval()
    try:
        samples = [tokenize(example, base.tokenizer) for example in examples]
        sums, counts = _losses(loss, samples, batch_tokens)
        questions = [example for example in examples if not isinstance(example, Text)]
        by: Literal["choice", "exact-match"] | None = None
        accuracy = None
        if len(questions) == len(examples):
            by_choice = all(question.choices for question in questions)
            by = "choice" if by_choice else "exact-match"
            judge = _right_by_choice if by_choice else _right_by_exact_match
            accuracy = judge(loss, questions, batch_tokens, progress) / len(questions)
        else:
            progress(len(examples))
    finally:
        base.model.train(was_training)
    return Evaluation(
        loss=float(sums.sum() / counts.sum()),
        accuracy=accuracy,
        by=by,
        num_samples=len(examples),
    )


def evaluate_both(
    loss: ModelLoss,
    examples: Sequence[Example],
    layers: Mapping[str, LoraLinear],
    *,
    batch_tokens: int,
) -> tuple[Evaluation, Evaluation]:
    """Return the evaluation with the adapter in `layers`, and that of the base model alone."""
    with tqdm(total=2 * len(examples), desc="evaluating", unit="sample", file=sys.stderr) as bar:
        adapter = evaluate(loss, examples, batch_tokens=batch_tokens, progress=bar.update)
        with adapters_off(layers):
            alone = evaluate(loss, examples, batch_tokens=batch_tokens, progress=bar.update)
    return adapter, alone


def compared(adapter: Evaluation, alone: Evaluation) -> str:
    """Return in words what an adapter changes, from the base model alone to it."""
    told = f"{adapter.num_samples} samples, loss {alone.loss:.3f} -> {adapter.loss:.3f}"
    if adapter.accuracy is None or alone.accuracy is None:
        return told
    return f"{told}, {adapter.by} {alone.accuracy:.1%} -> {adapter.accuracy:.1%}"


def answer_is_right(answer: str, question: Question) -> bool:
    """Tell whether generated text is a right answer, whatever white space is at its ends."""
    return answer.strip() in {text.strip() for text in (question.completion, *question.references)}


def _losses(loss: ModelLoss, samples: Sequence[Sample], batch_tokens: int) -> tuple[Tensor, Tensor]:
    """Return summed loss and count of tokens with loss, both [num_samples]."""
    sums = torch.zeros(len(samples), dtype=torch.float64)
    counts = torch.zeros(len(samples), dtype=torch.int64)
    (batches,) = split_step(
        range(len(samples)),
        [len(sample) for sample in samples],
        num_processes=1,
        max_tokens=batch_tokens,
        packed=loss.packs,
    )
    for indices in batches:
        sums[indices], counts[indices] = loss.sample_losses([samples[i] for i in indices])
    return sums, counts


def _right_by_choice(
    loss: ModelLoss, questions: Sequence[Question], batch_tokens: int, progress: Progress
) -> int:
    num_right = 0
    for question in questions:
        assert question.answer is not None
        stem = question.completion.removesuffix(question.choices[question.answer])
        samples = [
            tokenize(question.answered(stem + choice), loss.base.tokenizer)
            for choice in question.choices
        ]
        sums, _ = _losses(loss, samples, batch_tokens)
        num_right += int(sums.argmin()) == question.answer
        progress(1)
    return num_right


@torch.no_grad()
def _right_by_exact_match(
    loss: ModelLoss, questions: Sequence[Question], batch_tokens: int, progress: Progress
) -> int:
    base, tokenizer = loss.base, loss.base.tokenizer
    prompts = [prompt_token_ids(question, tokenizer) for question in questions]
    limits = [
        max(
            len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + _SPARE_NEW_TOKENS
            for answer in (question.completion, *question.references)
        )
        for question in questions
    ]
    num_right = 0
    order = sorted(range(len(questions)), key=lambda index: len(prompts[index]) + limits[index])
    while order:
        longest = len(prompts[order[-1]]) + limits[order[-1]]
        count = max(1, batch_tokens // longest)
        indices, order = order[-count:], order[:-count]
        answers = _generate(base, [prompts[i] for i in indices], max(limits[i] for i in indices))
        num_right += sum(
            answer_is_right(answer, questions[i])
            for i, answer in zip(indices, answers, strict=True)
        )
        progress(len(indices))
    return num_right


def _generate(base: BaseModel, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Return greedy answers to prompts, padded on the left so that all end in one column."""
    longest = max(map(len, prompts))
    pad = base.pad_token_id
    token_ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    generate: Any = base.model.generate  # typed as a tensor by nn.Module
    generated = generate(
        input_ids=token_ids.to(base.model.device),
        attention_mask=mask.to(base.model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
    )
    answers: list[str] = base.tokenizer.batch_decode(
        generated[:, longest:], skip_special_tokens=True
    )
    return answers
