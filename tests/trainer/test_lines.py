import json
from pathlib import Path

import pytest

from adapters.errors import DataError
from tests.workloads import chat, write_lines
from trainer.data import Chat, PromptCompletion, Text
from trainer.lines import read_examples

SYSTEM = {"role": "system", "content": "Be short."}
ASK = {"role": "user", "content": "q"}
SAY = {"role": "assistant", "content": "a"}


def turns(*messages: object) -> str:
    return json.dumps({"messages": messages})


def test_lines_are_read_with_choices_references_and_limit(tmp_path: Path) -> None:
    lines = [
        chat("q", "it is b", choices=["a", "b"], answer=1),
        chat("q", "x", references=["x", "y"]),
        chat("q", "label", answer=7),  # the index of a class whose name stands in another file
    ]
    path = write_lines(tmp_path / "data.jsonl", list(lines))
    found = list(read_examples(path).values())
    chats = [example for example in found if isinstance(example, Chat)]
    assert [c.answer for c in chats] == [1, None, None]
    assert chats[1].references == ("x", "y")
    assert chats[0].completion == "it is b"
    assert list(read_examples(path, limit=2).values()) == found[:2]


def test_every_kind_of_line_is_read(tmp_path: Path) -> None:
    """Keys that are no kind's may stand beside, as the prompt of a published set of chats."""
    lines: dict[str, list[tuple[dict[str, object], object]]] = {
        "chat": [
            ({"messages": [SYSTEM, ASK, SAY], "prompt": "q"}, Chat((SYSTEM, ASK, SAY))),
            (
                {"prompt": [ASK, SAY, ASK], "completion": [SAY]},
                Chat((ASK, SAY, ASK, SAY), num_given=3),
            ),
        ],
        "completion": [
            ({"prompt": "p", "completion": "c"}, PromptCompletion("p", "c")),
            (
                {"prompt": "", "completion": "b", "choices": ["a", "b"], "answer": 1},
                PromptCompletion("", "b", ("a", "b"), 1),
            ),
            (
                {"prompt": "p", "completion": "c", "references": ["c", "d"]},
                PromptCompletion("p", "c", references=("c", "d")),
            ),
        ],
        "text": [({"text": "t", "id": 3}, Text("t"))],
    }
    for name, cases in lines.items():
        path = write_lines(tmp_path / name, [line for line, _ in cases])
        assert list(read_examples(path).values()) == [expected for _, expected in cases]


def test_lines_are_numbered_as_an_editor_does(tmp_path: Path) -> None:
    """Blank lines, ends of Windows, a byte order mark and separators of Unicode."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n \n{"text": "b\xe2\x80\xa8"}\n\n{"text": "c"}'
    )
    found = read_examples(path)
    assert found == {1: Text("a"), 4: Text("b\u2028"), 6: Text("c")}
    path.write_bytes(path.read_bytes() + b"\n\n{")
    with pytest.raises(DataError, match=r"data\.jsonl: line 8: not JSON \(Expecting.*column 2\)"):
        read_examples(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON \(.*\), one object a line is expected"),
        ("[1]", r'line 2: \[1\] is no object, one with "messages", or "prompt" and "completion"'),
        ("3", "line 2: 3 is no object"),
        ('{"prompt": "p"}', r"the keys \['prompt'\] is of no known kind, one with \"messages\""),
        (
            '{"messages": [], "text": "t"}',
            r"\['messages', 'text'\] is a chat and a text at once, one with",
        ),
        ('{"text": "t"}', "line 2: a text, but line 1 is a chat; one kind is expected in a file"),
        ('{"text": 1}', 'line 2: "text" is 1, a text is expected'),
        ('{"text": " \\n"}', 'line 2: "text" is " \\\\n", words are expected in it'),
        (
            '{"prompt": 1, "completion": null}',
            'line 2: "prompt" is 1, a text is expected; line 2: "completion" is None, a text',
        ),
        ('{"prompt": "p", "completion": " "}', '"completion" is " ", words are expected'),
        (
            '{"prompt": [], "completion": "c"}',
            'line 2: "c" stands for turns, a list of them is expected',
        ),
        ('{"messages": "hi"}', 'line 2: "hi" stands for turns, a list of them'),
        ('{"messages": []}', "line 2: no turn is the assistant's, the wanted answer is expected"),
        (turns(SYSTEM, ASK), "line 2: no turn is the assistant's"),
        (turns(ASK, SAY, ASK), "line 2: turn 3: the last is the user's, the assistant's with the"),
        (turns(SAY), "line 2: turn 1: the assistant's, the user's is expected; system only first"),
        (turns(SYSTEM, SAY), "line 2: turn 2: the assistant's, the user's is expected"),
        (turns(ASK, SYSTEM, SAY), "line 2: turn 2: the system's, the assistant's is expected"),
        (turns(ASK, ASK, SAY), "line 2: turn 2: the user's, the assistant's is expected"),
        (turns(ASK, SAY, SAY), "line 2: turn 3: the assistant's, the user's is expected"),
        (turns(SYSTEM, SYSTEM, ASK, SAY), "line 2: turn 2: the system's, the user's is expected"),
        (turns("hi", SAY), 'line 2: turn 1: "hi", an object with "role" and "content" is expected'),
        (
            turns({"role": "bot", "content": ""}, SAY),
            r'line 2: turn 1: "role" is "bot", one of system, user, assistant is expected',
        ),
        (
            turns({"role": "user", "content": 1}, SAY),
            'line 2: turn 1: "content" is 1, a text is expected',
        ),
        (
            turns({"role": "user"}, {"role": "assistant", "content": " \n"}),
            r'line 2: turn 1: "content" is None, .*; line 2: turn 2: the assistant says " \\n"',
        ),
        (turns(ASK, {"role": "assistant", "content": ""}), 'turn 2: the assistant says "", words'),
        (json.dumps(chat("q", "b", choices=["a", "b"], answer=0)), '"answer" is 0, an index into'),
        (json.dumps(chat("q", "b", choices=["a", "b"], answer=9)), '"answer" is 9, an index into'),
        (json.dumps(chat("q", "b", choices=["a", "b"], answer=True)), '"answer" is True, an index'),
        (json.dumps(chat("q", "b", choices="ab", answer=0)), '"choices" is "ab", a list of texts'),
        (json.dumps(chat("q", "b", choices=[1], answer=0)), r"\"choices\" is \[1\], a list of"),
        (json.dumps(chat("q", "b", references=["a", 1])), '"references" is'),
        (
            '{"messages": [{"role": "user", "content": "\\ud800"}]}',
            r"line 2: \\ud800 is half of a character \(a lone surrogate\), both halves",
        ),
        ("9" * 5000, "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(chat('q', 'a'))}\n{line}\n")
    with pytest.raises(DataError, match=message):
        read_examples(path)


def test_bytes_that_are_no_text_are_named_by_their_offset(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"line 3: not UTF-8 \(byte 0xe9 at offset 28 of the file"):
        read_examples(path)
    assert path.read_bytes()[28] == 0xE9
    path.write_bytes(b'\xef\xbb\xbf{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"line 1: not UTF-8 \(byte 0xe9 at offset 16 of the file"):
        read_examples(path)
    assert path.read_bytes()[16] == 0xE9


def test_a_pair_of_surrogates_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "\\ud83d\\ude00"}\n')
    assert read_examples(path) == {1: Text("\U0001f600")}


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("{\n" * 25)
    with pytest.raises(DataError, match=r"line 10: .*and 15 more mistakes$"):
        read_examples(path)


def test_a_huge_value_is_cut_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": ["x" * 100_000] * 10}))
    with pytest.raises(DataError, match='"text" is') as caught:
        read_examples(path)
    assert len(str(caught.value)) < 1000


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="can not be read"):
        read_examples(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no line"):
        read_examples(tmp_path / "empty.jsonl")
