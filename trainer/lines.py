"""JSON lines -> examples: what a line may hold, and every mistake with its line and turn.

Owns reading and checking of lines; `data` makes tokens of the examples, `dataset` joins files.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from adapters.errors import DataError
from adapters.problems import shown
from trainer.data import Chat, Example, Message, PromptCompletion, Text

_MAX_REPORTED_MISTAKES = 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_ROLES = ("system", "user", "assistant")
# The keys that make a line one of a kind; others, as "id", may stand beside them.
_KINDS = {
    "chat": ("messages",),
    "prompt with completion": ("prompt", "completion"),
    "text": ("text",),
}
_KINDS_IN_WORDS = '"messages", or "prompt" and "completion", or "text"'


class Mistake(NamedTuple):
    """What is wrong in a line, which is counted from 1, blank ones too."""

    line: int
    what: str


def read_examples(path: Path, *, limit: int | None = None) -> dict[int, Example]:
    """Return the examples of a JSON-lines file by line number.

    Args:
        path: a file of one kind of example; blank lines are passed over.
        limit: how many lines are read, the first ones; none reads all.
    Raises: DataError: the file can not be read, holds no line, or the mistakes of its lines.
    """
    examples, mistakes = parse_file(path, limit=limit)
    if mistakes:
        raise refusal(str(path), mistakes)
    return examples


def parse_file(path: Path, *, limit: int | None = None) -> tuple[dict[int, Example], list[Mistake]]:
    """Return the examples of a file by line number, and the mistakes of its other lines.

    Raises: DataError: the file can not be read, or holds no line.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, a JSON-lines file is expected") from None
    except OSError as error:
        raise DataError(f"{path}: can not be read ({error.strerror})") from error
    examples: dict[int, Example] = {}
    mistakes: list[Mistake] = []
    start, num_read = 0, 0
    first: tuple[int, str] | None = None
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip() and (limit is None or num_read < limit):
            num_read += 1
            try:
                example = _parse_line(line, start)
                first = first or (number, example.kind)
                _check_kind(example.kind, *first)
                examples[number] = example
            except DataError as error:
                mistakes += [Mistake(number, what) for what in error.args]
        start += len(line) + 1
    if not num_read:
        raise DataError(f"{path}: holds no line, one JSON object a line is expected")
    return examples, mistakes


def refusal(source: str, mistakes: Sequence[Mistake]) -> DataError:
    """Return the error that tells the first mistakes of a file, and how many there are."""
    told = "; ".join(f"line {line}: {what}" for line, what in mistakes[:_MAX_REPORTED_MISTAKES])
    more = len(mistakes) - _MAX_REPORTED_MISTAKES
    return DataError(f"{source}: {told}{f'; and {more} more mistakes' if more > 0 else ''}")


def _refuse(mistakes: Sequence[str]) -> None:
    """Raise what `parse_file` makes mistakes of, if there are any."""
    if mistakes:
        raise DataError(*mistakes)


def _check_kind(kind: str, first_line: int, first_kind: str) -> None:
    if kind != first_kind:
        raise DataError(
            f"a {kind}, but line {first_line} is a {first_kind}; one kind is expected in a file, "
            "split it"
        )


def _parse_line(line: bytes, start: int) -> Example:
    """Return the example of a line that begins at byte `start` of its file.

    Raises: DataError: its arguments are the mistakes.
    """
    parsed = _parse_json(line, start)
    if not isinstance(parsed, dict):
        raise DataError(f"{_quoted(parsed)} is no object, one with {_KINDS_IN_WORDS} is expected")
    kinds = [kind for kind, keys in _KINDS.items() if all(key in parsed for key in keys)]
    if len(kinds) != 1:
        what = f"is a {' and a '.join(kinds)} at once" if kinds else "is of no known kind"
        raise DataError(
            f"an object with the keys {shown(list(parsed))} {what}, one with {_KINDS_IN_WORDS} is "
            "expected"
        )
    if kinds == ["text"]:
        _refuse(_mistakes_of_text(parsed, "text"))
        return Text(parsed["text"])
    if kinds == ["prompt with completion"] and not isinstance(parsed["prompt"], list):
        prompt_mistakes = _mistakes_of_text(parsed, "prompt", may_be_blank=True)
        _refuse(prompt_mistakes + _mistakes_of_text(parsed, "completion"))
        completion = parsed["completion"]
        return PromptCompletion(parsed["prompt"], completion, *_parse_answers(parsed, completion))
    given = [] if kinds == ["chat"] else parsed["prompt"]
    messages = _parse_turns(given, parsed["messages" if kinds == ["chat"] else "completion"])
    answers = _parse_answers(parsed, messages[-1]["content"])
    return Chat(messages, *answers, num_given=len(given))


def _parse_json(line: bytes, start: int) -> Any:
    marked = start == 0 and line.startswith(_BYTE_ORDER_MARK)
    try:
        text = (line[len(_BYTE_ORDER_MARK) :] if marked else line).decode()
    except UnicodeDecodeError as error:
        offset = start + error.start + marked * len(_BYTE_ORDER_MARK)
        raise DataError(
            f"not UTF-8 (byte {error.object[error.start]:#04x} at offset {offset} of the file), "
            "UTF-8 is expected; save the file so"
        ) from error
    try:
        parsed = json.loads(text)
        if "\\u" in text:  # the only way to half a character
            json.dumps(parsed, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(
            f"{half} is half of a character (a lone surrogate), both halves are expected"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"not JSON ({error.msg}, column {error.colno}), one object a line is expected"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error}), one object a line is expected") from error
    return parsed


def _mistakes_of_text(
    parsed: Mapping[str, Any], key: str, *, may_be_blank: bool = False
) -> list[str]:
    value = parsed[key]
    if not isinstance(value, str):
        return [f'"{key}" is {_quoted(value)}, a text is expected']
    if not value.strip() and not may_be_blank:
        return [f'"{key}" is {_quoted(value)}, words are expected in it']
    return []


def _quoted(value: object) -> str:
    """Return a value of a line as a message may hold it, texts in quotation marks."""
    return f'"{shown(value)}"' if isinstance(value, str) else shown(value)


def _parse_turns(given: Any, rest: Any) -> tuple[Message, ...]:
    """Return the turns of two lists; they are counted from 1, through both.

    Raises: DataError: its arguments are the mistakes.
    """
    if not isinstance(given, list) or not isinstance(rest, list):
        found = given if not isinstance(given, list) else rest
        raise DataError(f"{_quoted(found)} stands for turns, a list of them is expected")
    mistakes: list[str] = []
    messages: list[Message] = []
    for number, turn in enumerate((*given, *rest), start=1):
        try:
            messages.append(_parse_turn(turn))
        except DataError as error:
            mistakes.append(f"turn {number}: {error}")
    if not mistakes:
        mistakes = _mistakes_of_order([message["role"] for message in messages])
    _refuse(mistakes)
    return tuple(messages)


def _parse_turn(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f'{_quoted(turn)}, an object with "role" and "content" is expected')
    role, content = turn.get("role"), turn.get("content")
    if role not in _ROLES:
        raise DataError(f'"role" is {_quoted(role)}, one of {", ".join(_ROLES)} is expected')
    if not isinstance(content, str):
        raise DataError(f'"content" is {_quoted(content)}, a text is expected')
    if role == "assistant" and not content.strip():
        raise DataError(f"the assistant says {_quoted(content)}, words are expected")
    return {"role": role, "content": content}


def _mistakes_of_order(roles: Sequence[str]) -> list[str]:
    if "assistant" not in roles:
        return ["no turn is the assistant's, the wanted answer is expected as the last"]
    for number, role in enumerate(roles, start=1):
        num_before = number - 1 - (roles[0] == "system")
        expected = "user" if num_before % 2 == 0 else "assistant"
        if role != expected and not (role == "system" and number == 1):
            return [
                f"turn {number}: the {role}'s, the {expected}'s is expected; system only first, "
                "then user and assistant take turns"
            ]
    if roles[-1] != "assistant":
        return [
            f"turn {len(roles)}: the last is the {roles[-1]}'s, the assistant's with the wanted "
            "answer is expected"
        ]
    return []


def _parse_answers(
    parsed: Mapping[str, Any], completion: str
) -> tuple[tuple[str, ...], int | None, tuple[str, ...]]:
    """Return choices, index of the right one, and references of a line."""
    choices = _parse_texts(parsed, "choices")
    # Sets with many classes keep the index of a class here and its name in a file of labels.
    answer = parsed.get("answer") if choices else None
    if choices and not _is_answer(answer, choices, completion):
        raise DataError(
            f'"answer" is {_quoted(answer)}, an index into the {len(choices)} choices is expected, '
            "of the one that the answer's words end with"
        )
    return choices, answer, _parse_texts(parsed, "references")


def _parse_texts(parsed: Mapping[str, Any], key: str) -> tuple[str, ...]:
    texts = parsed.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f'"{key}" is {_quoted(texts)}, a list of texts is expected')
    return tuple(texts)


def _is_answer(answer: Any, choices: Sequence[str], completion: str) -> bool:
    return (
        isinstance(answer, int)
        and not isinstance(answer, bool)
        and 0 <= answer < len(choices)
        and completion.endswith(choices[answer])
    )
