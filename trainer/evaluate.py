"""Held-out loss and accuracy: choice by log-likelihood, exact match by greedy generation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.batching import batches_of_length_order
from trainer.data import Chat, Sample, render, tokenize_chat
from trainer.loss import sample_losses
from trainer.model import BaseModel

Progress = Callable[[int], object]
# An answer longer than the longest right one by this much is wrong anyway.
_SPARE_NEW_TOKENS = 8


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out chats.

    Args:
        loss: mean negative log-likelihood of the answers' tokens, in nats.
        accuracy: share of chats answered right, 0 to 1.
        by: how an answer was taken: "choice" (the most likely one) or "exact-match" (greedy
            generation).
        num_samples: chats evaluated.
    """

    loss: float
    accuracy: float
    by: str
    num_samples: int


def evaluate(
    base: BaseModel, chats: Sequence[Chat], *, batch_tokens: int, progress: Progress
) -> Evaluation:
    """Measure loss and accuracy of `base.model`, with whatever adapter is in it.

    Args:
        chats: at least one; accuracy is by choice if all have choices, else by exact match.
        batch_tokens: tokens of one forward, padding included.
        progress: called with the number of chats done since the last call.
    """
    was_training = base.model.training
    base.model.eval()
    try:
        samples = [tokenize_chat(chat.messages, base.tokenizer) for chat in chats]
        sums, counts = _losses(base, samples, batch_tokens)
        by_choice = all(chat.choices for chat in chats)
        judge = _right_by_choice if by_choice else _right_by_exact_match
        num_right = judge(base, chats, batch_tokens, progress)
    finally:
        base.model.train(was_training)
    return Evaluation(
        loss=float(sums.sum() / counts.sum()),
        accuracy=num_right / len(chats),
        by="choice" if by_choice else "exact-match",
        num_samples=len(chats),
    )


def answer_is_right(answer: str, chat: Chat) -> bool:
    """Tell whether generated text is a right answer, whatever white space is at its ends."""
    return answer.strip() in {text.strip() for text in (chat.completion, *chat.references)}


def _losses(base: BaseModel, samples: Sequence[Sample], batch_tokens: int) -> tuple[Tensor, Tensor]:
    """Return summed loss and count of tokens with loss, both [num_samples]."""
    sums = torch.zeros(len(samples), dtype=torch.float64)
    counts = torch.zeros(len(samples), dtype=torch.int64)
    for indices, batch in batches_of_length_order(
        samples, batch_tokens=batch_tokens, pad_token_id=base.pad_token_id
    ):
        sums[indices], counts[indices] = sample_losses(base.model, batch)
    return sums, counts


def _right_by_choice(
    base: BaseModel, chats: Sequence[Chat], batch_tokens: int, progress: Progress
) -> int:
    num_right = 0
    for chat in chats:
        assert chat.answer is not None
        stem = chat.completion.removesuffix(chat.choices[chat.answer])
        samples = [
            tokenize_chat(
                (*chat.prompt, {"role": "assistant", "content": stem + choice}), base.tokenizer
            )
            for choice in chat.choices
        ]
        sums, _ = _losses(base, samples, batch_tokens)
        num_right += int(sums.argmin()) == chat.answer
        progress(1)
    return num_right


@torch.no_grad()
def _right_by_exact_match(
    base: BaseModel, chats: Sequence[Chat], batch_tokens: int, progress: Progress
) -> int:
    tokenizer = base.tokenizer
    prompts = [
        tokenizer(
            render(chat.prompt, tokenizer, add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]
        for chat in chats
    ]
    limits = [
        max(
            len(tokenizer(answer, add_special_tokens=False)["input_ids"]) + _SPARE_NEW_TOKENS
            for answer in (chat.completion, *chat.references)
        )
        for chat in chats
    ]
    num_right = 0
    order = sorted(range(len(chats)), key=lambda index: len(prompts[index]) + limits[index])
    while order:
        longest = len(prompts[order[-1]]) + limits[order[-1]]
        count = max(1, batch_tokens // longest)
        indices, order = order[-count:], order[:-count]
        answers = _generate(base, [prompts[i] for i in indices], max(limits[i] for i in indices))
        num_right += sum(
            answer_is_right(answer, chats[i]) for i, answer in zip(indices, answers, strict=True)
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
