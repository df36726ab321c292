import logging
import os
import re
from pathlib import Path

import pytest

from adapters.errors import ConfigError
from rora_serve.key_file import KeyFile, _TenantSettings, kept_secret
from rora_serve.tenants import Limits, Tenant, key_digest

SECRET = b"s" * 32


def line(*keys: str) -> str:
    hashes = ", ".join(f'"sha256:{key_digest(key).hex()}"' for key in keys)
    return f"keys = [{hashes}]\n"


def table(name: str, *keys: str, more: str = "") -> str:
    return f"[tenants.{name}]\n{line(*keys)}{more}\n"


TWO = table("acme", "key-a", "key-b") + table("globex", "key-g")


class Keys:
    """A key file and the time that it is told."""

    def __init__(self, path: Path, content: str = TWO) -> None:
        self.path = path
        self.now = 0.0
        self.write(content)
        self.file = KeyFile(path, cache_secret=SECRET, clock=lambda: self.now)

    def write(self, content: str) -> None:
        self.path.write_text(content)
        self.path.chmod(0o600)

    def name_of(self, key: str | None, *, after: float = 1.0) -> str | None:
        """The tenant's name, asked so many seconds later."""
        self.now += after
        tenant = self.file.tenant_of(key)
        return None if tenant is None else tenant.name


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.toml")


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "rora_serve.key_file")
    return caplog


def test_each_key_has_its_tenant_and_others_have_none(keys: Keys) -> None:
    assert [keys.name_of(key) for key in ("key-a", "key-b", "key-g")] == ["acme", "acme", "globex"]


@pytest.mark.parametrize(
    "key",
    [
        None,
        "",
        " ",
        "key-",
        "key-a ",
        " key-a",
        "key-a\n",
        "KEY-A",
        "key-ab",
        "key-\u0430",
        "key-\udc00",
        f"sha256:{key_digest('key-a').hex()}",
        key_digest("key-a").hex(),
        "acme",
    ],
)
def test_whatever_is_not_a_key_has_no_tenant(keys: Keys, key: str | None) -> None:
    assert keys.name_of(key) is None
    assert keys.name_of("key-a") == "acme"


def test_all_of_a_tenant_comes_from_the_file(tmp_path: Path) -> None:
    more = (
        'use = ["acme-*", "shared"]\nupload = ["acme-*"]\nmanage = ["acme-x"]\nbase = false\n'
        "weight = 2\nrequests_per_minute = 3\ntokens_per_minute = 4\nmax_concurrent = 5\n"
        "max_tokens = 6\n"
    )
    file = Keys(tmp_path / "keys.toml", table("acme", "k", more=more)).file
    tenant = file.tenant_of("k")
    assert tenant is not None
    assert tenant == Tenant(
        "acme",
        use=("acme-*", "shared"),
        upload=("acme-*",),
        manage=("acme-x",),
        may_use_base=False,
        weight=2.0,
        limits=Limits(requests_per_minute=3, tokens_per_minute=4, max_concurrent=5, max_tokens=6),
        cache_salt=tenant.cache_salt,
    )


def test_by_default_a_tenant_may_use_the_base_and_nothing_else(keys: Keys) -> None:
    tenant = keys.file.tenant_of("key-g")
    assert tenant is not None
    assert tenant == Tenant("globex", cache_salt=tenant.cache_salt)
    assert tenant.may_use_base


def test_a_tenant_without_keys_is_locked_out_and_stays_a_tenant(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.toml", table("acme") + table("globex", "key-g"))
    assert [keys.name_of(key) for key in ("", "key-g")] == [None, "globex"]


HASH = f"sha256:{'0' * 64}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "tenants: missing, a value is expected"),
        ("[tenants]", "tenants: dictionary should have at least 1 item"),
        ("tenants = 3", "tenants: input should be a valid dictionary"),
        ("tenants.acme = 3", r"tenants\.acme: input should be a valid dictionary"),
        ("[tenants.acme]", r"tenants\.acme\.keys: missing, a value is expected"),
        ("[tenants.acme]\nkeys = [1]", r"acme\.keys\.0: input should be a valid string"),
        (f'[tenants.acme]\nkeys = "{HASH}"', r"acme\.keys: input should be a valid list"),
        (
            f'[tenants.acme]\nkeys = ["{HASH}", "{HASH[:-1]}"]',
            r"acme\.keys\.1: 'sha256:' and 64 hexadecimal digits in lower case are expected; the "
            "key itself has no place here",
        ),
        (f'[tenants.acme]\nkeys = ["{HASH[:-1]}A"]', "64 hexadecimal digits in lower case"),
        (f'[tenants.acme]\nkeys = ["{HASH[7:]}"]', "64 hexadecimal digits in lower case"),
        (table("acme", ""), r"acme\.keys\.0: the hash of no key at all"),
        (table("acme", more='use = "*"'), r"acme\.use: input should be a valid list"),
        (table("acme", more='use = [""]'), r"acme\.use\.0: letters in lower case"),
        (table("acme", more='use = ["Acme-*"]'), r"acme\.use\.0: letters in lower case, digits"),
        (table("acme", more='upload = ["a", "a?"]'), r"acme\.upload\.1: .* '\*' for any text"),
        (table("acme", more='manage = ["a@prod"]'), r"acme\.manage\.0: letters in lower case"),
        (table("acme", more='base = "yes"'), r"acme\.base: input should be a valid boolean"),
        (table("acme", more="base = 1"), r"acme\.base: input should be a valid boolean"),
        (table("acme", more="weight = 0"), r"acme\.weight: input should be greater than or eq"),
        (table("acme", more="weight = 101"), r"acme\.weight: input should be less than or equal"),
        (table("acme", more="weight = nan"), r"acme\.weight: input should be a finite number"),
        (table("acme", more="weight = true"), r"acme\.weight: input should be a valid number"),
        (table("acme", more="max_tokens = 0"), r"acme\.max_tokens: input should be greater than"),
        (table("acme", more=f"max_tokens = {2**53 + 1}"), r"max_tokens: input should be less than"),
        (table("acme", more="max_tokens = 1.0"), r"acme\.max_tokens: input should be a valid int"),
        (table("acme", more='max_concurrent = "1"'), r"max_concurrent: input should be a valid i"),
        (
            table("acme", more="requests_per_minut = 1"),
            r"acme\.requests_per_minut: unknown key; nearest known key: "
            r"tenants\.acme\.requests_per_minute",
        ),
        ("tenant.acme = 1", "tenant: unknown key; nearest known key: tenants"),
        (table("Acme"), r"tenants\.Acme\.\[key\]: tenant 'Acme': 1 to 64 lower-case letters"),
        (table("everybody"), "tenant 'everybody': reserved for servers without a key file"),
        (
            table("a", "one", "two") + table("b", "two", "one") + table("c", "one"),
            "sha256:7692c3ad3540…: held by a and b and c, one tenant is expected; "
            "sha256:3fc4ccfe7458…: held by a and b, one tenant is expected",
        ),
        (table("acme") + table("acme"), "not TOML"),
        ("[tenants.acme", "not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Keys(tmp_path / "keys.toml", text)
    assert str(caught.value).startswith(f"{tmp_path / 'keys.toml'}: ")


def test_all_mistakes_are_told_at_once_each_in_its_tenant(tmp_path: Path) -> None:
    text = table("a", more="maneg = []\nbase = 0") + table("B", more="wight = 1\nmax_tokens = -1")
    with pytest.raises(ConfigError) as caught:
        Keys(tmp_path / "keys.toml", text)
    parts = (
        "a.maneg: unknown key; nearest known key: tenants.a.manage",
        "a.base: input should be a valid boolean",
        "tenant 'B': 1 to 64 lower-case letters",
        "B.wight: unknown key; nearest known key: tenants.B.weight",
        "B.max_tokens: input should be greater than or equal to 1",
    )
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(
    "text",
    [
        '[tenants.acme]\nkeys = ["rora-secret"]',
        '[tenants.acme]\nkeys = "rora-secret"',
        '[tenants.acme]\nkeys = ["sha256:rora-secret"]',
        'tenants.acme = "rora-secret"',
        'tenants = ["rora-secret"]',
        'key = "rora-secret"',
        table("acme", more='use = ["rora-secret!"]'),
        table("acme", more='weight = "rora-secret"'),
        "rora-secret\n" + TWO,
    ],
)
def test_a_key_that_was_pasted_into_the_file_is_not_repeated(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Keys(tmp_path / "keys.toml", text)
    assert "secret" not in str(caught.value)


def test_there_has_to_be_a_file_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys\.toml: no such file"):
        KeyFile(tmp_path / "keys.toml", cache_secret=SECRET)
    with pytest.raises(ConfigError, match="can not be read"):
        KeyFile(tmp_path, cache_secret=SECRET)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_file_that_others_read_is_warned_of(
    keys: Keys, log: pytest.LogCaptureFixture, mode: int
) -> None:
    KeyFile(keys.path, cache_secret=SECRET)
    assert log.messages == []
    keys.path.chmod(mode)
    KeyFile(keys.path, cache_secret=SECRET)
    assert log.messages == [
        f"{keys.path}: others than its owner may read it (mode {mode:o}), 600 is expected; chmod it"
    ]


def test_a_changed_file_holds_within_a_second(keys: Keys, log: pytest.LogCaptureFixture) -> None:
    keys.write(table("initech", "key-a") + table("globex", "key-n"))
    assert keys.name_of("key-a", after=0.99) == "acme"
    assert log.messages == []
    assert keys.name_of("key-a", after=0.01) == "initech"
    assert [keys.name_of(key) for key in ("key-b", "key-g", "key-n")] == [None, None, "globex"]
    assert log.messages == [f"{keys.path}: read again, 2 keys"]


def test_a_revoked_key_is_noticed_where_size_and_times_of_the_content_stay(keys: Keys) -> None:
    """As after `rsync --inplace --times`: only the inode's own time of change tells."""
    before = keys.path.stat()
    keys.write(TWO.replace(key_digest("key-b").hex(), key_digest("key-x").hex()))
    os.utime(keys.path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = keys.path.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (
        before.st_size, before.st_ino, before.st_mtime_ns,
    )  # fmt: skip
    assert keys.name_of("key-b") is None
    assert keys.name_of("key-x") == "acme"


def test_an_unchanged_file_is_not_read_again(keys: Keys, log: pytest.LogCaptureFixture) -> None:
    tenant = keys.file.tenant_of("key-a")
    keys.now += 10
    assert keys.file.tenant_of("key-a") is tenant
    assert log.messages == []


@pytest.mark.parametrize("content", ["", "[tenants.acme", TWO + "x = 1", TWO.replace("sha", "")])
def test_a_broken_file_keeps_the_tenants_and_is_told_once(
    keys: Keys, log: pytest.LogCaptureFixture, content: str
) -> None:
    keys.write(content)
    for _ in range(3):
        assert keys.name_of("key-a") == "acme"
    (told,) = log.messages
    assert re.match(rf"{keys.path}: .*; the keys and tenants that were read before", told)
    keys.write(content + " ")  # another change, which is another line
    assert keys.name_of("key-a") == "acme"
    assert len(log.messages) == 2
    keys.write(table("initech", "key-a"))
    assert keys.name_of("key-a") == "initech"


def test_a_deleted_file_keeps_the_tenants_until_there_is_one(
    keys: Keys, log: pytest.LogCaptureFixture
) -> None:
    keys.path.unlink()
    for _ in range(3):
        assert keys.name_of("key-a") == "acme"
    assert len(log.messages) == 1
    assert "no such file" in log.messages[0]
    keys.write(table("initech", "key-a"))
    assert keys.name_of("key-a") == "initech"


def test_a_link_that_is_moved_is_followed(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    """Kubernetes mounts a secret as links through `..data`, and moves that in one step."""
    for folder, content in (("..first", TWO), ("..second", table("initech", "key-a"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "keys.toml").write_text(content)
        (tmp_path / folder / "keys.toml").chmod(0o600)
        os.utime(tmp_path / folder / "keys.toml", (1, 1))
    data = tmp_path / "..data"
    data.symlink_to("..first")
    (tmp_path / "keys.toml").symlink_to("..data/keys.toml")
    now = [0.0]
    file = KeyFile(tmp_path / "keys.toml", cache_secret=SECRET, clock=lambda: now[0])
    moved = tmp_path / "..data_tmp"
    moved.symlink_to("..second")
    moved.replace(data)
    now[0] = 1.0
    tenant = file.tenant_of("key-a")
    assert tenant is not None
    assert tenant.name == "initech"
    assert log.messages == [f"{tmp_path / 'keys.toml'}: read again, 1 keys"]


def test_a_salt_stays_when_keys_are_rotated_and_the_server_starts_anew(keys: Keys) -> None:
    def salt(key: str) -> str | None:
        keys.now += 1
        tenant = keys.file.tenant_of(key)
        assert tenant is not None
        return tenant.cache_salt

    before = salt("key-a")
    assert before == salt("key-b")
    keys.write(table("acme", "key-c", more="weight = 3"))
    assert salt("key-c") == before
    keys.file = KeyFile(keys.path, cache_secret=SECRET, clock=lambda: keys.now)
    assert salt("key-c") == before
    # It tells tenants apart, and can not be had without the secret.
    keys.write(table("acm", "key-c"))
    assert salt("key-c") != before
    keys.write(table("acme", "key-c"))
    keys.file = KeyFile(keys.path, cache_secret=b"t" * 32, clock=lambda: keys.now)
    assert salt("key-c") != before
    assert re.fullmatch(r"[0-9a-f]{64}", before or "")


def test_a_secret_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "rora" / "secret"
    secret = kept_secret(path)
    assert len(secret) == 32
    assert kept_secret(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["secret"]
    assert kept_secret(tmp_path / "other") != secret


def test_where_no_secret_can_be_kept_each_start_has_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "secret", tmp_path / "file", tmp_path):
        first, second = kept_secret(path), kept_secret(path)
        assert len(first) == len(second) == 32
        assert first != second


def test_the_documented_keys_are_those_of_the_file() -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    section = text.partition("## Tenants")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.M)
    documented = re.findall(r"`(\w+)`", "".join(rows))
    assert documented == list(_TenantSettings.model_fields)
