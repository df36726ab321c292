"""The key file: which tenants there are, read again when it changes."""

import hmac
import logging
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from adapters.errors import ConfigError
from adapters.names import is_digest
from adapters.settings import read_settings
from adapters.writer import make_folder
from rora_serve.name_patterns import check_pattern
from rora_serve.tenants import HASH_PREFIX, Limits, Tenant, check_tenant_name, key_digest

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0
_OTHERS_READ = 0o044
_SECRET_BYTES = 32


def _check_hash(text: str) -> str:
    digits = text.removeprefix(HASH_PREFIX)
    if digits == text or not is_digest(digits):
        raise ValueError(
            f"'{HASH_PREFIX}' and 64 hexadecimal digits in lower case are expected; the key itself "
            "has no place here"
        )
    if digits == key_digest("").hex():
        raise ValueError("the hash of no key at all; hash a key")
    return text


_Patterns = list[Annotated[str, AfterValidator(check_pattern)]]
_Hashes = list[Annotated[str, AfterValidator(_check_hash)]]
_Limit = Annotated[int, Field(ge=1, le=2**53)]  # which counts in floats keep exactly


class _Settings(BaseModel):
    # Messages do not repeat what stands in the file: it may be a key in the wrong place.
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
    )


class _TenantSettings(_Settings):
    """A tenant as the key file has it; no right is given that is not written there."""

    keys: _Hashes
    use: _Patterns = []
    upload: _Patterns = []
    manage: _Patterns = []
    base: bool = True
    weight: float = Field(1.0, ge=0.01, le=100)
    requests_per_minute: _Limit | None = None
    tokens_per_minute: _Limit | None = None
    max_concurrent: _Limit | None = None
    max_tokens: _Limit | None = None

    def tenant(self, name: str, cache_secret: bytes) -> Tenant:
        """Return the tenant.

        Its salt comes from its name, which stays when keys are rotated, and from a secret, since
        clients know names.
        """
        return Tenant(
            name,
            use=tuple(self.use),
            upload=tuple(self.upload),
            manage=tuple(self.manage),
            may_use_base=self.base,
            weight=self.weight,
            limits=Limits(
                requests_per_minute=self.requests_per_minute,
                tokens_per_minute=self.tokens_per_minute,
                max_concurrent=self.max_concurrent,
                max_tokens=self.max_tokens,
            ),
            cache_salt=hmac.digest(cache_secret, name.encode(), "sha256").hex(),
        )


class _KeyFileSettings(_Settings):
    """The whole file; one without tenants is taken for one that is being written."""

    tenants: dict[Annotated[str, AfterValidator(check_tenant_name)], _TenantSettings] = Field(
        min_length=1
    )

    @model_validator(mode="after")
    def _a_key_has_one_tenant(self) -> Self:
        holders: dict[str, list[str]] = {}
        for name, settings in self.tenants.items():
            for text in dict.fromkeys(settings.keys):
                holders.setdefault(text, []).append(name)
        shared = [
            f"{text[: len(HASH_PREFIX) + 12]}…: held by {' and '.join(names)}, one tenant is "
            "expected"
            for text, names in holders.items()
            if len(names) > 1
        ]
        if shared:
            raise ValueError("; ".join(shared))
        return self


def read_tenants(path: Path, *, cache_secret: bytes) -> list[tuple[Tenant, list[bytes]]]:
    """Return the tenants of a key file, each with the digests of its keys.

    Args: cache_secret: from which salts are made, see `kept_secret`.
    Raises: ConfigError: every mistake in the file.
    """
    settings = read_settings(_KeyFileSettings, path, {})
    return [
        (
            given.tenant(name, cache_secret),
            [bytes.fromhex(text.removeprefix(HASH_PREFIX)) for text in given.keys],
        )
        for name, given in settings.tenants.items()
    ]


def exposed(path: Path) -> str | None:
    """Say that others than its owner may read a key file; None if they may not."""
    state = _state(path)
    if state is None or not state.mode & _OTHERS_READ:
        return None
    mode = f"{state.mode:03o}"
    return f"{path}: others than its owner may read it (mode {mode}), 600 is expected; chmod it"


class KeyFile:
    """The tenants of a file, which is read again when it changes.

    A file that is broken or gone by then changes nothing, and the log says so once.

    Args:
        path: of the file; may be a link that is moved, as Kubernetes does with secrets.
        cache_secret: from which salts are made, see `kept_secret`.
        clock: seconds, never going back.
    Raises: ConfigError: every mistake in the file.
    Cost: one look at the file a second at most. Reading it when it changed, 0.3 ms a tenant, in the
        caller's thread. A question compares a hash with every hash that is here, 0.15 us each.
    """

    def __init__(
        self, path: Path, *, cache_secret: bytes, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._path = path
        self._cache_secret = cache_secret
        self._clock = clock
        self._looked = clock()
        self._state = _state(path)
        self._holders = self._read()

    def tenant_of(self, key: str | None) -> Tenant | None:
        """Return the tenant whose key this is, or None."""
        self._follow()
        if key is None:
            return None
        digest = key_digest(key)
        found = None
        # All of them, so that the time says nothing of which hashes are here.
        for held, tenant in self._holders:
            if hmac.compare_digest(held, digest):
                found = tenant
        return found

    def _follow(self) -> None:
        """Read the file again if it changed since it was last looked at, a second ago or more."""
        now = self._clock()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        # Looked at before it is read: what changes in between is seen the next time.
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._holders = self._read()
        except ConfigError as error:
            logger.error("%s; the keys and tenants that were read before stay in force", error)
        else:
            logger.info("%s: read again, %d keys", self._path, len(self._holders))

    def _read(self) -> list[tuple[bytes, Tenant]]:
        found = read_tenants(self._path, cache_secret=self._cache_secret)
        exposure = exposed(self._path)
        if exposure is not None:
            logger.warning("%s", exposure)
        return [(digest, tenant) for tenant, digests in found for digest in digests]


class _State(NamedTuple):
    """What tells one state of a file from another.

    The time of change of the inode is in it, for tools that keep the time of change of the content,
    and for a chmod that lets a file be read.
    """

    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    mode: int


def _state(path: Path) -> _State | None:
    """Return the state of the file at `path`, through links; None if it can not be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    mode = stat.S_IMODE(found.st_mode)
    return _State(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, mode)


def kept_secret(path: Path) -> bytes:
    """Return the random bytes that the file at `path` keeps; made at the first call.

    So salts are the same after a restart, for caches that outlive the server. Where nothing can be
    kept they are this process's own, which is as safe.
    """
    try:
        if not path.exists():
            make_folder(path.parent)
            with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # its owner's alone
                file.write(secrets.token_bytes(_SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
                # Never a part of it; and of several servers that start at once, one has its way.
                with suppress(FileExistsError):
                    path.hardlink_to(file.name)
        secret = path.read_bytes()
    except OSError:
        secret = b""
    return secret if len(secret) == _SECRET_BYTES else secrets.token_bytes(_SECRET_BYTES)
