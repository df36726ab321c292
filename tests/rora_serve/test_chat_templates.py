"""Adapters' own chat templates against transformers' rendering; hostile ones against limits."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from adapters.errors import AdapterMismatchError
from rora_serve.chat_templates import (
    MAX_CHARACTERS,
    ChatTemplate,
    ChatTemplateError,
    TemplateProcess,
)
from trainer.model import load_tokenizer

SECONDS = 1.0
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ bos_token }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}"
    "{% endfor %}{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "macros": "{% macro say(m) %}[{{ m.role | upper }}]{{ m.content | trim }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "turns": "{% set ns = namespace(i=0) %}{% for m in messages %}"
    "{% if m.role != 'system' and (m.role == 'user') != (ns.i % 2 == 0) %}"
    "{{ raise_exception('turns') }}{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}"
    "{{ m.content }}{% set ns.i = ns.i + 1 %}{% endfor %}",
    "tools": "{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}{% endfor %}"
    "{% for m in messages %}{{ m.content }}{% generation %}{{ m.role }}{% endgeneration %}"
    "{% endfor %}",
}
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Why <is> it "so"?'},
    {"role": "assistant", "content": "Because é."},
    {"role": "user", "content": "And?"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def templates() -> Iterator[TemplateProcess]:
    process = TemplateProcess(seconds=SECONDS, num_bytes=128 << 20)
    yield process
    process.close()


@pytest.fixture(scope="module")
def tokenizer(default_model: Any) -> PreTrainedTokenizerBase:
    return load_tokenizer(default_model)


def write(templates: TemplateProcess, template: str, **chat: Any) -> str:
    return templates.write(template, {"messages": MESSAGES, **chat}).result()


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("generation", [True, False])
def test_a_chat_is_written_as_transformers_does(
    name: str, generation: bool, templates: TemplateProcess, tokenizer: PreTrainedTokenizerBase
) -> None:
    options: dict[str, Any] = {"add_generation_prompt": generation, "tools": TOOLS}
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, **options
    )
    found = write(templates, TEMPLATES[name], **tokenizer.special_tokens_map, **options)
    assert found == expected


def test_the_last_message_is_continued_as_transformers_does(
    templates: TemplateProcess, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = tokenizer.apply_chat_template(
        MESSAGES, chat_template=CHATML, tokenize=False, continue_final_message=True
    )
    found = write(templates, CHATML, **tokenizer.special_tokens_map, continue_final_message=True)
    assert found == expected
    assert found.endswith("And?")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_writes_what_the_user_says_is_served(
    name: str, templates: TemplateProcess
) -> None:
    found = templates.read(TEMPLATES[name].encode()).result()
    assert found == ChatTemplate(TEMPLATES[name], "string")


def test_a_template_that_takes_parts_gets_parts(templates: TemplateProcess) -> None:
    assert templates.read(PARTS.encode()).result().content_format == "openai"


# Each would take minutes, gigabytes or the server itself if it could.
BOMBS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "letters": "{% for a in messages[0].content %}" * 9 + "x" + "{% endfor %}" * 9,
    "power": "{{ 9 ** (9 ** 9) }}",
    "doubled": "{% set ns = namespace(s='x' * 999) %}{% for i in range(99) %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "folded": "{{ 'ab'" + "|join('0123456789abcdef')" * 12 + " }}",
    "format": "{{ '%999999999d' % 1 }}",
    "product": "{{ 'x' * 9999999999 }}",
    "centre": "{{ 'x' | center(999999999) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "long": "{% for i in range(99) %}{{ 'x' * 999999 }}{% endfor %}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_hostile_template_fails_in_bounded_time_and_others_are_written(
    name: str, templates: TemplateProcess
) -> None:
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError) as caught:
        write(templates, BOMBS[name])
    assert time.monotonic() - begun < 100 * SECONDS, "a start of the process is in it"
    assert "\n" not in str(caught.value)
    # The control: the process, or the next one, goes on.
    assert write(templates, "{{ messages[1].content }}") == MESSAGES[1]["content"]


def test_what_took_too_long_rests_for_whoever_asked(templates: TemplateProcess) -> None:
    slow_for_some = "{% if messages[0].content == 'slow' %}" + BOMBS["loops"] + "{% endif %}written"
    slow = {"messages": [{"role": "user", "content": "slow"}]}
    with pytest.raises(ChatTemplateError, match="more than 1 s"):
        templates.write(slow_for_some, slow, user="hostile").result()
    begun = time.monotonic()
    with pytest.raises(ChatTemplateError, match="was ended; send the request again later"):
        templates.write(slow_for_some, slow, user="hostile").result()
    assert time.monotonic() - begun < SECONDS / 2, "it was tried again"
    others = {"messages": MESSAGES}
    assert templates.write(slow_for_some, others, user="other").result() == "written"


def test_much_time_for_one_leaves_some_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rora_serve.chat_templates._BUDGET_SECONDS", 0.5)
    monkeypatch.setattr("rora_serve.chat_templates._BUDGET_SECONDS_OF_USER", 1.0)
    process = TemplateProcess(seconds=10)
    slow = "{% for i in range(300) %}{% for j in range(9999) %}{% endfor %}{% endfor %}x"
    try:
        assert process.write("{{ 1 }}", {"messages": []}).result() == "1"
        asked = [process.write(slow, {"messages": []}, user="a") for _ in range(100)]
        assert asked[0].result() == "x"
        with pytest.raises(ChatTemplateError, match=r"0\.5 of the last 30 s"):
            asked[-1].result()
        # Also where one says the same in many ways.
        asked = [process.write(slow + "y" * n, {"messages": []}, user="a") for n in range(100)]
        with pytest.raises(
            ChatTemplateError, match=r"this tenant's chat templates computed for 1 of"
        ):
            asked[-1].result()
        # Nor does it help to bring them: the first two seconds of trying them are all.
        with pytest.raises(AdapterMismatchError, match="this tenant's chat templates computed"):
            process.read(b"{{ messages[0].content }}", user="a").result()
        assert process.write(slow, {"messages": []}, user="b").result() == "x"
    finally:
        process.close()


def test_memory_that_a_template_leaves_behind_is_not_others() -> None:
    process = TemplateProcess(seconds=20, num_bytes=128 << 20)
    try:
        for number in range(16):
            kept = "{% set a = '" + str(number % 10) + "' * 8000000 %}" + f"{number}"
            assert write(process, kept) == str(number)
        assert write(process, "{{ 'x' * 9999 }}") == "x" * 9999
    finally:
        process.close()


def test_a_process_that_was_ended_is_nobodys_fault(templates: TemplateProcess) -> None:
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        assert write(templates, "{{ messages[1].content }}") == MESSAGES[1]["content"]
        process = templates._process
        assert process is not None
        assert process.pid is not None
        os.kill(process.pid, signal_number)
        process.join()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "not UTF-8"),
        (b"{% if %}", "line 1: Expected an expression"),
        (b"{{ add_generation_prompt }}", "does not write what the user says"),
        (b"{{ raise_exception('never') }}", "never"),
        (b"{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        (b"{% include 'x' %}", "loader"),
    ],
)
def test_a_template_that_writes_no_chat_is_refused(
    content: bytes, reason: str, templates: TemplateProcess
) -> None:
    with pytest.raises(AdapterMismatchError) as caught:
        templates.read(content).result()
    assert reason in str(caught.value)


def test_a_chat_that_is_too_long_is_refused(templates: TemplateProcess) -> None:
    long = [{"role": "user", "content": "x" * (MAX_CHARACTERS // 8)}]
    template = "{{ messages[0].content }}" * 9
    with pytest.raises(ChatTemplateError, match=f"at most {MAX_CHARACTERS}"):
        templates.write(template, {"messages": long}).result()
