import pytest

from adapters.errors import AdapterMismatchError
from rora_serve.chat_templates import MAX_SERVED_BYTES, MAX_WORK, read_template

SERVED = {
    "chatml": "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<s>{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "headers": "{% set rest = messages %}{% for m in rest %}{% set text = '<h>' + m['role']"
    " + '</h>' + m['content'] | trim %}{% if loop.index0 == 0 %}"
    "{% set text = bos_token + text %}{% endif %}"
    "{{ text }}{% endfor %}",
    "turns": "{% set ns = namespace(i=0) %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set rest = messages[1:] %}{% else %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if (m.role == 'user') != (ns.i % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
    "{% if loop.last and system is defined %}{{ system + '\n' }}{% endif %}{{ m.content }}"
    "{% set ns.i = ns.i + 1 %}{% endfor %}",
    "tools": "{% for m in messages %}{% if loop.last and tools %}{% for tool in tools %}"
    "{{ tool | tojson }}{% endfor %}{% endif %}{% for call in m.tool_calls %}"
    "{{ call.function.arguments | tojson }}{% for k, v in call.function.arguments.items() %}"
    "{{ k ~ v }}{% endfor %}{% endfor %}{% endfor %}",
    "indent": "{% for tool in tools %}{{ tool | tojson(indent=4) }}{% endfor %}",
    "filtered": "{% for m in messages | selectattr('role', 'equalto', 'user') %}"
    "{{ m.content | replace('a', 'b') }}{% endfor %}",
}  # fmt: skip
REFUSED = {
    "\n{% for i in range(9) %}{% endfor %}": "line 2 has a call of 'range'",
    "{{ 'x' * 999999999 }}": "'mul'",
    "{{ 9 ** 9 ** 9 }}": "'pow'",
    "{{ '%999999999d' % 1 }}": "'%' of something",
    "{{ messages[0].content % 1 }}": "'%' of something",
    "{{ 'x' | center(999999999) }}": "the filter 'center'",
    "{{ 'x'.ljust(999999999) }}": "a call of 'ljust'",
    "{{ '{:9999999}'.format(1) }}": "a call of 'format'",
    "{{ tools | tojson(indent=99999) }}": "the filter 'tojson' with such",
    "{{ m | join(messages[0].content) }}": "the filter 'join' with such",
    "{{ m | replace('a', messages[0].content) }}": "the filter 'replace' with such",
    "{{ messages | map('center', 99999) }}": "the filter 'map' with such",
    "{% macro m() %}{{ m() }}{% endmacro %}": "'macro'",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "a recursive loop",
    "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}": "over messages in",
    "{% for c in messages[0].content.split('') %}{% endfor %}": "a loop over something else",
    "{% include 'x' %}": "'include'",
    "{% import 'x' as x %}": "'import'",
    "{% extends 'x' %}": "'extends'",
    "{% set x %}{{ x }}{{ x }}{% endset %}": "'assignblock'",
    "{% set ns = namespace(s='x') %}{% for m in messages %}"
    "{% set ns.s = ns.s + ns.s %}{% endfor %}":
        "a 'namespace' adds to",
    "{% set ns = namespace(s='x') %}{% for m in messages %}{% set t = ns.s %}"
    "{% set ns.s = t ~ t %}{% endfor %}": "a 'namespace' adds to",
    "{% set x = messages %}" + "{% set x = x ~ x %}" * 40: "too many times over",
    "{% set a = namespace(s='x') %}{% set b = a %}{% for m in messages %}"
    "{% set b.s = a.s ~ a.s %}{% endfor %}": "a field of 'b', which is no 'namespace'",
    "{% set a = namespace(s='x') %}{% set b = [a] %}": "more than set and read by fields",
    "{% set ns = namespace(i='%99999999d') %}{{ ns.i % 2 }}{% set ns.i = ns.i + 1 %}":
        "'%' of something",
    "{% set x = '" + "x" * 40_000 + "' %}" + "{{ x }}" * 100: "too many times over",
    "{% if %}": "a mistake",
    "\n\n{{ cycler('a') }}": "line 3 has a call of 'cycler'",
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_what_templates_are_made_of_is_served(name: str) -> None:
    template = read_template(SERVED[name].encode())
    assert template.text == SERVED[name]
    messages = [{"role": "user", "content": "x" * 500}] * 40
    assert template.work(messages, None) < MAX_WORK


@pytest.mark.parametrize("text", REFUSED)
def test_what_can_grow_is_refused(text: str) -> None:
    with pytest.raises(AdapterMismatchError) as caught:
        read_template(text.encode())
    assert REFUSED[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_is_small_text() -> None:
    read_template(b"x" * MAX_SERVED_BYTES)
    with pytest.raises(AdapterMismatchError, match="at most 65536"):
        read_template(b"x" * (MAX_SERVED_BYTES + 1))
    with pytest.raises(AdapterMismatchError, match="not UTF-8"):
        read_template(b"\xff")


def test_the_whole_request_in_every_round_is_too_much_work() -> None:
    template = read_template(b"{% for m in messages %}{{ messages }}{% endfor %}")
    message = {"role": "user", "content": "x" * 100}
    assert template.work([message] * 10, None) < MAX_WORK
    assert template.work([message] * 10_000, None) > MAX_WORK


@pytest.mark.parametrize(
    "question",
    [
        "messages[1:-1] == messages[2:]",
        "messages[1:-1] is eq messages[2:]",
        "not (messages[1:-1] == messages[2:])",
        "m in messages",
        "m is in messages",
    ],
)
def test_what_is_compared_item_by_item_is_work(question: str) -> None:
    text = "{% for m in messages %}{% if " + question + " %}x{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "x"}] * 10_000
    assert read_template(text.encode()).work(messages, None) > MAX_WORK


@pytest.mark.parametrize("question", ["m.role == 'user'", "not m.content", "m.tools is defined"])
def test_what_is_answered_at_once_is_none(question: str) -> None:
    text = "{% for m in messages %}{% if " + question + " %}x{% endif %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 1000}] * 10_000
    assert read_template(text.encode()).work(messages, None) < MAX_WORK
