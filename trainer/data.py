"""Examples and samples: chats, prompts with completions, texts -> token ids and those with loss.

Owns the kinds of example, the chat template and the loss mask. The tokens before an answer are the
very ones that a server sends when it asks for that answer. `lines` reads examples from files.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from adapters.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """Turns that the model's chat template joins; the assistant's carry loss.

    Args:
        messages: turns with "role" and "content"; the last is the assistant's.
        choices: for multiple choice, what the answer may be; the last turn ends with one of them.
        answer: index of the right one in `choices`.
        references: all right answers, if there are more than the last turn.
        num_given: leading turns that carry no loss, whoever's they are.
    """

    kind: ClassVar[str] = "chat"

    messages: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    answer: int | None = None
    references: tuple[str, ...] = ()
    num_given: int = 0

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last."""
        return self.messages[:-1]

    @property
    def completion(self) -> str:
        """The wanted answer: the content of the last turn."""
        return self.messages[-1]["content"]

    def answered(self, completion: str) -> "Chat":
        """Return this chat with another last turn."""
        last = {"role": "assistant", "content": completion}
        return replace(self, messages=(*self.prompt, last))


@dataclass(frozen=True)
class PromptCompletion:
    """Raw text without a chat template; the completion and the end token carry loss.

    Args:
        prompt: what a server is asked with, possibly nothing.
        completion: the wanted answer.
        choices: for multiple choice, what the answer may be; the completion ends with one of them.
        answer: index of the right one in `choices`.
        references: all right answers, if there are more than the completion.
    """

    kind: ClassVar[str] = "prompt with completion"

    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    answer: int | None = None
    references: tuple[str, ...] = ()

    def answered(self, completion: str) -> "PromptCompletion":
        """Return this prompt with another completion."""
        return replace(self, completion=completion)


@dataclass(frozen=True)
class Text:
    """Raw text whose every token but the first carries loss, the end token too."""

    kind: ClassVar[str] = "text"

    text: str


Question = Chat | PromptCompletion
Example = Question | Text


@dataclass(frozen=True)
class Sample:
    """Token ids of an example, and for each whether it carries loss; the first never does."""

    token_ids: tuple[int, ...]
    has_loss: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def loss_places(self) -> tuple[int, ...]:
        """Indices of the tokens that carry loss; never 0, since nothing predicts the first."""
        return tuple(place for place, carries in enumerate(self.has_loss) if carries)


def num_common_tokens(samples: Sequence[Sample]) -> int:
    """Return how many tokens all samples begin with."""
    # The first and the last in order differ where any two do.
    first, last = (choose(sample.token_ids for sample in samples) for choose in (min, max))
    for place, (one, other) in enumerate(zip(first, last, strict=False)):
        if one != other:
            return place
    return min(len(first), len(last))


def tokenize(example: Example, tokenizer: "PreTrainedTokenizerBase") -> Sample:
    """Return the tokens of an example of any kind, at least one of which carries loss.

    Raises: DataError: no token carries loss, or the chat template refuses the chat.
    """
    match example:
        case Chat():
            sample = tokenize_chat(example.messages, tokenizer, num_given=example.num_given)
        case PromptCompletion():
            sample = _tokenize_completion(example, tokenizer)
        case Text():
            # Special tokens as by default, which is how a server reads raw text.
            token_ids = _ended(tokenizer(example.text)["input_ids"], tokenizer)
            sample = _sample(token_ids, [True] * len(token_ids))
    if not any(sample.has_loss):
        raise DataError(
            f"no token of {len(sample)} carries loss, an answer of one or more is expected"
        )
    return sample


def prompt_token_ids(example: Question, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the tokens that a server sends when it asks for the answer of `example`.

    As vLLM does: what a chat template writes holds its special tokens already; raw text gets those
    that the tokenizer adds by default, as a begin token.
    """
    prompt: list[int]
    if isinstance(example, PromptCompletion):
        prompt = tokenizer(example.prompt)["input_ids"]
    else:
        text = render(example.prompt, tokenizer, add_generation_prompt=True)
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
    return prompt


def tokenize_chat(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", *, num_given: int = 0
) -> Sample:
    """Return the tokens of a chat; those of the assistant, up to the end token, carry loss.

    Args:
        messages: turns; what follows the last of the assistant's is left out.
        tokenizer: with a chat template.
        num_given: leading turns that carry no loss.
    Raises: DataError: the chat template changes earlier turns when later ones follow, so that no
        mask is exact.
    """
    token_ids: list[int] = []
    has_loss: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < num_given:
            continue
        before = render(messages[:index], tokenizer, add_generation_prompt=True)
        after = render(messages[: index + 1], tokenizer)
        if not before.startswith(done) or not after.startswith(before):
            raise DataError(
                f"turn {index + 1}: the chat template changes earlier turns when this one follows, "
                "the same text is expected; train on single turns or use another template"
            )
        prompt = _continue_with(token_ids, done, before, tokenizer)
        token_ids = _continue_with(prompt, before, after, tokenizer)
        answer = token_ids[len(prompt) :]
        # What the template writes after the end token is never asked of the model.
        end_token = tokenizer.eos_token_id
        end = answer.index(end_token) + 1 if end_token in answer else len(answer)
        has_loss += [False] * (len(prompt) - len(has_loss))
        has_loss += [position < end for position in range(len(answer))]
        done = after
    return _sample(token_ids, has_loss)


def _tokenize_completion(example: PromptCompletion, tokenizer: "PreTrainedTokenizerBase") -> Sample:
    prompt = prompt_token_ids(example, tokenizer)
    whole: list[int] = tokenizer(example.prompt + example.completion)["input_ids"]
    # As in a chat: where a token would join both sides, the model first reads the prompt alone.
    if whole[: len(prompt)] != prompt:
        whole = prompt + tokenizer(example.completion, add_special_tokens=False)["input_ids"]
    completion = _ended(whole[len(prompt) :], tokenizer)
    return _sample(prompt + completion, [False] * len(prompt) + [True] * len(completion))


def _ended(token_ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return tokens that end with the end token, as they do already or by adding it."""
    end_token = tokenizer.eos_token_id
    return token_ids if token_ids[-1:] == [end_token] else [*token_ids, end_token]


def _sample(token_ids: Sequence[int], has_loss: Sequence[bool]) -> Sample:
    """Return a sample whose first token carries no loss, whatever `has_loss` says of it."""
    return Sample(tuple(token_ids), (False, *has_loss[1:]) if has_loss else ())


def _continue_with(
    token_ids: list[int], text: str, longer: str, tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Return the tokens of `longer`, which begins with `text`, beginning with those of `text`.

    They are the tokens of the whole where these begin so, as they do with almost every template.
    Where a token would join both sides, the model first reads `text` alone, so the rest is added.
    """
    whole: list[int] = tokenizer(longer, add_special_tokens=False)["input_ids"]
    if whole[: len(token_ids)] == token_ids:
        return whole
    rest: list[int] = tokenizer(longer[len(text) :], add_special_tokens=False)["input_ids"]
    return token_ids + rest


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a chat by the model's template.

    Raises: DataError: the model has no template, or the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the base model has no chat template, one is expected; use an instruct model, or data "
            'of "prompt" and "completion"'
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )
    except Exception as error:  # jinja's errors, and whatever a template raises
        raise DataError(f"the chat template refuses this chat ({error})") from error


def file_digest(path: Path) -> str:
    """Return the hexadecimal sha256 of a data file, for the adapter's provenance."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
