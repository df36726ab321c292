import re
import tomllib
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rora_serve.cli
from adapters.errors import AuthenticationError, ConfigError
from rora_serve.key_file import KeyFile
from rora_serve.tenants import (
    EVERYBODY,
    Limits,
    Tenant,
    check_tenant_name,
    key_digest,
    new_key,
    presented_key,
)

RIGHTS = ("use", "upload", "manage")


def allowed(tenant: Tenant, name: str) -> set[str]:
    """The rights on one adapter, as the methods say."""
    asked = (tenant.may_use(name), tenant.may_upload(name), tenant.may_manage(name))
    return {right for right, may in zip(RIGHTS, asked, strict=True) if may}


@pytest.mark.parametrize(("granted", "right"), list(product(RIGHTS, RIGHTS)))
@pytest.mark.parametrize("name", ["acme-chat", "globex-chat"])
def test_each_right_is_its_own_and_ends_at_its_pattern(granted: str, right: str, name: str) -> None:
    tenant = Tenant("acme", **{granted: ("acme-*",)})  # type: ignore[arg-type]
    may = granted == right and name == "acme-chat"
    assert (right in allowed(tenant, name)) is may


def test_nothing_is_granted_that_was_not_named() -> None:
    assert allowed(Tenant("acme"), "acme") == set()
    assert allowed(Tenant("acme"), "") == set()


def test_everybody_may_do_everything_without_limits_in_one_cache() -> None:
    assert allowed(EVERYBODY, "any.name_at-all") == set(RIGHTS)
    assert EVERYBODY.may_use_base
    assert (EVERYBODY.limits, EVERYBODY.cache_salt) == (Limits(), None)


@pytest.mark.parametrize(
    ("pattern", "matched", "others"),
    [
        ("*", ["", "a", "acme-chat", "a.b_c"], []),
        ("acme-*", ["acme-", "acme-chat", "acme-*"], ["acme", "acm-x", "xacme-chat", "ACME-chat"]),
        ("*-chat", ["-chat", "acme-chat", "a-chat-chat"], ["acme-chats", "chat", "acme-Chat"]),
        ("a*b*c", ["abc", "axbxc", "abcbc", "abbc"], ["ab", "acb", "ac", "abcx", "xabc"]),
        ("ab*ba", ["abba", "abxba"], ["aba", "ab", "ba"]),
        ("a**b", ["ab", "axb"], ["a", "b", "abx"]),
        ("acme", ["acme"], ["acme-", "acm", "acme-chat", "Acme", " acme", "acme\n", ""]),
        ("", [""], ["a"]),
        # What is special to regular expressions and shells is itself.
        ("a.c", ["a.c"], ["abc", "a\nc"]),
        ("[ab]?+(x)|y$", ["[ab]?+(x)|y$"], ["a", "ax", "y", "bx"]),
        (r"\w", [r"\w"], ["a", "w"]),
        # Letters that look alike: Cyrillic, fullwidth, dotless, long; two ways to write an accent.
        ("acme-*", [], ["\u0430cme-chat", "\uff41cme-chat", "acme\u2010chat", "acme\u200b-chat"]),
        ("lisa", ["lisa"], ["l\u0131sa", "li\u017fa", "lisa\u0301", "LISA"]),
        ("caf\u00e9", ["caf\u00e9"], ["cafe\u0301", "cafe"]),
    ],
)
def test_only_a_star_is_special_in_a_pattern(
    pattern: str, matched: list[str], others: list[str]
) -> None:
    tenant = Tenant("t", use=("unrelated", pattern))
    assert [name for name in (*matched, *others) if tenant.may_use(name)] == matched


@given(st.text("ab*", max_size=8), st.text("ab", max_size=10))
def test_patterns_match_as_the_plain_regular_expression(pattern: str, name: str) -> None:
    expression = ".*".join(map(re.escape, pattern.split("*")))
    expected = re.fullmatch(expression, name) is not None
    assert Tenant("t", use=(pattern,)).may_use(name) is expected


def test_no_name_makes_a_pattern_slow() -> None:
    """As a regular expression with backtracking this would not end."""
    tenant = Tenant("t", use=("*a" * 40 + "b",))
    assert not tenant.may_use("a" * 100_000)
    assert tenant.may_use("a" * 100_000 + "b")


def bearer(value: bytes, name: bytes = b"authorization") -> tuple[bytes, bytes]:
    return (name, value)


OTHER = (b"host", b"x")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([bearer(b"Bearer rora-K_1")], "rora-K_1"),
        ([OTHER, bearer(b"bearer a.b~c+d/e-f=="), OTHER], "a.b~c+d/e-f=="),
        ([bearer(b"BEARER x", b"Authorization")], "x"),
        ([bearer(b" Bearer   x ")], "x"),
        ([], None),
        ([OTHER], None),
        ([bearer(b"")], None),
        ([bearer(b"Bearer")], None),
        ([bearer(b"Bearer   ")], None),
        ([bearer(b"Basic dTpw")], None),
        ([bearer(b"rora-K")], None),
        ([bearer(b"Bearer\tx")], None),
        ([bearer(b"Bearer-x y")], None),
        # Ways that OpenAI's clients do not use.
        ([(b"api-key", b"x"), (b"x-api-key", b"x"), (b"proxy-authorization", b"Bearer x")], None),
    ],
)
def test_a_key_is_read_from_one_header(headers: list[tuple[bytes, bytes]], key: str | None) -> None:
    assert presented_key(headers) == key


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer a b",
        b"Bearer a, Bearer b",
        b"Bearer a,b",
        b"Bearer a\tb",
        b"Bearer a\x00",
        b"Bearer a\n",
        b'Bearer "a"',
        b"Bearer a=b",
        b"Bearer \xc3\xa4",
        b"Bearer a\xff",
        b"Bearer \xa0a",
    ],
)
def test_what_is_not_plainly_one_key_is_refused(value: bytes) -> None:
    with pytest.raises(AuthenticationError, match=r"^Authorization: after Bearer one key of lett"):
        presented_key([bearer(value)])


@pytest.mark.parametrize("second", [b"Bearer right", b"Bearer other", b"", b"Basic dTpw"])
def test_two_headers_are_refused_whatever_they_say(second: bytes) -> None:
    with pytest.raises(AuthenticationError, match="2 headers, one is expected; send one key"):
        presented_key([bearer(b"Bearer right"), OTHER, bearer(second, b"AUTHORIZATION")])


def test_a_new_key_is_256_random_bits_that_a_header_can_carry() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    for key in keys:
        assert re.fullmatch(r"rora-[A-Za-z0-9_-]{43}", key)
        assert presented_key([bearer(b"Bearer " + key.encode())]) == key


@pytest.mark.parametrize("name", ["acme", "a.b", "1", "x" * 64])
def test_key_prints_a_key_once_and_the_lines_that_take_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rora_serve.cli.main(["key", name]) == 0
    captured = capsys.readouterr()
    key, _, lines = captured.out.partition("\n")
    assert captured.err == ""
    assert key not in lines
    assert tomllib.loads(lines) == {
        "tenants": {name: {"keys": [f"sha256:{key_digest(key).hex()}"]}}
    }


def test_a_pasted_key_lets_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rora_serve.cli.main(["key", "acme"])
    key, _, lines = capsys.readouterr().out.partition("\n")
    path = tmp_path / "keys.toml"
    path.write_text(lines)
    tenant = KeyFile(path, cache_secret=b"s").tenant_of(key)
    assert tenant is not None
    assert tenant.name == "acme"


@pytest.mark.parametrize("name", ["Acme", "", "-a", "a b", "../x", "a\nb", "x" * 65, "\u0430cme"])
def test_a_name_that_breaks_the_grammar_gets_no_key(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="1 to 64 lower-case letters, digits"):
        check_tenant_name(name)
    assert rora_serve.cli.main(["key", "--", name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 to 64 lower-case letters" in captured.err


def test_everybody_is_no_name_to_take(capsys: pytest.CaptureFixture[str]) -> None:
    assert rora_serve.cli.main(["key", "everybody"]) == 2
    assert "'everybody': reserved for servers without a key file" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["key"], ["key", "a", "b"]])
def test_key_takes_one_name(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        rora_serve.cli.main(argv)
    assert caught.value.code == 2


def test_help_tells_of_key(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--help"], ["key", "--help"]):
        with pytest.raises(SystemExit) as caught:
            rora_serve.cli.main(argv)
        assert caught.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "`rora-serve key NAME` makes a key for a tenant of --keys" in said
    assert "kept nowhere" in said
