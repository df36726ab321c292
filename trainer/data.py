"""Samples: JSON lines of chats -> token ids and the tokens that carry loss.

Owns reading and checking of lines, the chat template and the loss mask. The tokens before an answer
are the very ones that a server sends when it asks for that answer.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
_ROLES = ("system", "user", "assistant")
_MAX_REPORTED_MISTAKES = 10


@dataclass(frozen=True)
class Chat:
    """One line of data.

    Args:
        messages: turns with "role" and "content"; the last is the assistant's.
        choices: for multiple choice, what the answer may be; the last turn ends with one of them.
        answer: index of the right one in `choices`.
        references: all right answers, if there are more than the last turn.
    """

    messages: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    answer: int | None = None
    references: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The turns before the last."""
        return self.messages[:-1]

    @property
    def completion(self) -> str:
        """The wanted answer: the content of the last turn."""
        return self.messages[-1]["content"]


@dataclass(frozen=True)
class Sample:
    """Token ids of a chat, and for each whether it carries loss."""

    token_ids: tuple[int, ...]
    has_loss: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.token_ids)


def read_chats(path: Path, *, limit: int | None = None) -> list[Chat]:
    """Return the chats of a JSON-lines file, the first `limit` of them if given.

    Raises: DataError: the file can not be read, holds no line, or the mistakes of its lines.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, a JSON-lines file is expected") from None
    except OSError as error:
        raise DataError(f"{path}: can not be read ({error.strerror})") from error
    chats, mistakes = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            chats.append(_parse_chat(line))
        except DataError as error:
            mistakes.append(f"line {number}: {error}")
        if limit is not None and len(chats) == limit:
            break
    if mistakes:
        more = len(mistakes) - _MAX_REPORTED_MISTAKES
        shown = "; ".join(mistakes[:_MAX_REPORTED_MISTAKES])
        raise DataError(f"{path}: {shown}{f'; and {more} more lines' if more > 0 else ''}")
    if not chats:
        raise DataError(f"{path}: holds no line, one JSON object a line is expected")
    return chats


def tokenize_chat(messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase") -> Sample:
    """Return the tokens of a chat; those of the assistant, up to the end token, carry loss.

    Raises: DataError: the chat template changes earlier turns when later ones follow, so that no
        mask is exact.
    """
    token_ids: list[int] = []
    has_loss: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
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
    return Sample(tuple(token_ids), tuple(has_loss))


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
            "the base model has no chat template, one is expected; use an instruct model"
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


def _parse_chat(line: bytes) -> Chat:
    try:
        parsed = json.loads(line)
        json.dumps(parsed, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}), one object a line is expected") from error
    if not isinstance(parsed, dict) or not isinstance(parsed.get("messages"), list):
        raise DataError('an object with a list "messages" is expected')
    messages = tuple(_parse_message(message) for message in parsed["messages"])
    if not messages or messages[-1]["role"] != "assistant":
        raise DataError(
            "the last message is not the assistant's, the wanted answer is expected there"
        )
    choices = _texts(parsed, "choices")
    # Sets with many classes keep the index of a class here and its name in a file of labels.
    answer = parsed.get("answer") if choices else None
    if choices and not _is_answer(answer, choices, messages[-1]["content"]):
        raise DataError(
            f"answer {answer!r}: an index into the {len(choices)} choices is expected, of the one "
            "that the last message ends with"
        )
    return Chat(messages, choices, answer, _texts(parsed, "references"))


def _texts(parsed: dict[str, Any], key: str) -> tuple[str, ...]:
    texts = parsed.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'"{key}" is {texts!r}, a list of texts is expected')
    return tuple(texts)


def _parse_message(message: Any) -> Message:
    if (
        not isinstance(message, dict)
        or message.get("role") not in _ROLES
        or not isinstance(message.get("content"), str)
    ):
        raise DataError(f'message {message!r}: "role" ({", ".join(_ROLES)}) and "content" expected')
    return {"role": message["role"], "content": message["content"]}


def _is_answer(answer: Any, choices: Sequence[str], completion: str) -> bool:
    return (
        isinstance(answer, int)
        and not isinstance(answer, bool)
        and 0 <= answer < len(choices)
        and completion.endswith(choices[answer])
    )
