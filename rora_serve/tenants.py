"""Tenants: who may ask, for what, and how much; and their keys.

Which tenants there are stands in a file, `rora_serve.key_file`; what they used of their limits is
counted in `rora_serve.limits`. Knows headers as bytes and nothing else of HTTP.
"""

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import AuthenticationError, ConfigError
from adapters.names import is_name
from adapters.problems import shown
from rora_serve.name_patterns import matches_any

HASH_PREFIX = "sha256:"
_KEY_BYTES = 32
_KEY = re.compile(rb"[A-Za-z0-9._~+/-]+=*")  # RFC 6750, b64token


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a tenant may ask for; None is no limit.

    Args:
        requests_per_minute: that begin.
        tokens_per_minute: read and written.
        max_concurrent: requests at once.
        max_tokens: that one request may write.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """Somebody who holds keys.

    Args:
        name: in logs and metrics.
        use, upload, manage: patterns of adapter names, in which `*` stands for any text. None of
            the three includes another.
        may_use_base: whether requests may go to the base model.
        weight: of its share when there is not enough for all.
        limits: of what it may ask for.
        cache_salt: what keeps its prefixes apart from those of others in the engine's cache, so
            that the time of an answer tells nothing about them; None shares.
    """

    name: str
    use: tuple[str, ...] = ()
    upload: tuple[str, ...] = ()
    manage: tuple[str, ...] = ()
    may_use_base: bool = True
    weight: float = 1.0
    limits: Limits = Limits()
    cache_salt: str | None = None

    def may_use(self, name: str) -> bool:
        """Tell whether requests may go to the adapter of this name; versions have no part in it."""
        return matches_any(self.use, name)

    def may_upload(self, name: str) -> bool:
        """Tell whether versions of this name may be added."""
        return matches_any(self.upload, name)

    def may_manage(self, name: str) -> bool:
        """Tell whether aliases may be moved, versions loaded, unloaded, pinned and deleted."""
        return matches_any(self.manage, name)

    @property
    def is_operator(self) -> bool:
        """Whether it manages every adapter, and so may see what all tenants do."""
        return "*" in self.manage


# Who asks where there is no key file: all rights, no limits, one cache.
EVERYBODY = Tenant("everybody", use=("*",), upload=("*",), manage=("*",))


def presented_key(headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """Return the key of `Authorization: Bearer KEY`, what OpenAI's clients send; None without one.

    A proxy in front may look at another header, or at another part of one, than this does; so
    what could be read in two ways is refused.

    Args: headers: names and values, as ASGI has them.
    Raises: AuthenticationError: several such headers, several keys, or none that is one.
    """
    values = [value for name, value in headers if name.lower() == b"authorization"]
    if len(values) > 1:
        raise AuthenticationError(
            f"Authorization: {len(values)} headers, one is expected; send one key"
        )
    scheme, _, rest = (values[0] if values else b"").strip(b" ").partition(b" ")
    key = rest.strip(b" ")
    if scheme.lower() != b"bearer" or not key:
        return None
    if not _KEY.fullmatch(key):
        raise AuthenticationError(
            "Authorization: after Bearer one key of letters, digits, '.', '_', '~', '+', '/' and "
            "'-' is expected; send it as rora-serve key printed it"
        )
    return key.decode("ascii")


def new_key() -> str:
    """Return a key that nobody has."""
    return f"rora-{secrets.token_urlsafe(_KEY_BYTES)}"


def key_digest(key: str) -> bytes:
    """Return what is kept of a key.

    One sha256 is right: a key is 256 random bits, which no one can try. Slow hashes and salts are
    for passwords that people choose.
    """
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def key_lines(name: str, key: str) -> str:
    """Return what the key file says of a tenant with this key, in TOML."""
    return f'[tenants."{name}"]\nkeys = ["{HASH_PREFIX}{key_digest(key).hex()}"]'


def check_tenant_name(name: str) -> str:
    """Return `name` if it may name a tenant.

    Raises: ConfigError: it breaks the grammar or is reserved.
    """
    if not is_name(name):
        raise ConfigError(
            f"tenant {shown(name)!r}: 1 to 64 lower-case letters, digits, '.', '_' or '-' are "
            "expected, beginning with a letter or digit"
        )
    if name == EVERYBODY.name:
        raise ConfigError(f"tenant {name!r}: reserved for servers without a key file")
    return name
