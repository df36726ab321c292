"""What may be taken from a name, and what the name is without it. Knows no files.

`leased` are the digests of versions that somebody uses and that stand against it; with force, none.
"""

from collections.abc import Collection

from adapters.errors import StoreConflictError
from adapters.names import LATEST, MIN_DIGEST_PREFIX, NameHistory, NameRecord, Version


def check_name_may_go(record: NameRecord, leased: Collection[str], *, force: bool) -> None:
    """See that nothing stands against removing a name.

    Raises: StoreConflictError: it has aliases besides `latest`, or is in use.
    """
    others = sorted(set(record.aliases) - {LATEST})
    if others and not force:
        raise StoreConflictError(
            f"adapter {record.name!r}: has the aliases {', '.join(others)}; remove them first, "
            "or force it"
        )
    _check_not_leased(record.name, record.versions, leased)


def without_alias(history: NameHistory, alias: str, *, at: int) -> NameHistory:
    """Return a name without one of its aliases.

    Raises: AdapterNotFoundError: it has none such; StoreConflictError: it is `latest`.
    """
    history.record.find(alias)
    if alias == LATEST:
        raise StoreConflictError(
            f"adapter {history.record.name!r}: alias 'latest' is what the bare name means; remove "
            "the name or move the alias"
        )
    return history.without_alias(alias, at=at)


def without_version(
    history: NameHistory, version: Version, leased: Collection[str], *, force: bool, at: int
) -> NameHistory:
    """Return a name without one of its versions; with force, without the aliases that mean it.

    Raises: StoreConflictError: an alias means it, it is in use, or it is the last one.
    """
    record = history.record
    public_id = f"sha256:{version.digest[:MIN_DIGEST_PREFIX]}"
    meaning = sorted(alias for alias, means in record.aliases.items() if means == version.digest)
    if meaning and not force:
        raise StoreConflictError(
            f"adapter {record.name!r}: {public_id} is what {', '.join(meaning)} means; move the "
            "alias first, or force it"
        )
    _check_not_leased(record.name, (version,), leased)
    left = tuple(other for other in record.versions if other.digest != version.digest)
    if not left:
        raise StoreConflictError(
            f"adapter {record.name!r}: {public_id} is its last version; remove the name"
        )
    for alias in meaning:
        if alias == LATEST:
            previous = history.with_versions(left).previous(LATEST) or left[-1].digest
            history = history.moved(LATEST, previous, action="remove", at=at)
        else:
            history = history.without_alias(alias, at=at)
    return history.with_versions(left)


def kept_versions(
    record: NameRecord, keep: int | None, leased: Collection[str]
) -> tuple[Version, ...]:
    """Return the versions that stay when the `keep` newest do, what is aliased and what is used."""
    if keep is None:
        return record.versions
    newest = {version.digest for version in record.versions[max(len(record.versions) - keep, 0) :]}
    needed = newest | set(record.aliases.values()) | set(leased)
    return tuple(version for version in record.versions if version.digest in needed)


def _check_not_leased(name: str, versions: tuple[Version, ...], leased: Collection[str]) -> None:
    in_use = {version.digest for version in versions} & set(leased)
    if in_use:
        raise StoreConflictError(
            f"adapter {name!r}: sha256:{min(in_use)[:MIN_DIGEST_PREFIX]} is in use by a "
            "running server; stop it or unload the adapter first, or force it"
        )
