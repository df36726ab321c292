"""Deployment: what a server with these settings would serve, found out without starting one.

What the server refuses is asked of the parts that refuse it there. Neither vLLM nor torch is
imported, and nothing is written but a base model that is not here yet.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from adapters import AdapterStore, ResolvedVersion
from adapters.errors import AdapterNameError, ArtifactError, ConfigError, RoraError
from adapters.names import LATEST, NameRecord
from adapters.probe import read_probe
from adapters.problems import describe
from adapters.receipt import BaseShapes
from adapters.store import verify
from adapters.verdict_files import ProbeRecord
from rora_serve.catalog import describe_fitting
from rora_serve.chat_templates import TemplateProcess
from rora_serve.config import ServeConfig
from rora_serve.host_tier import check_fits
from rora_serve.key_file import exposed, read_tenants
from rora_serve.memory import adapter_memory
from rora_serve.models import ServedBase, check_names, read_base, without_place
from rora_serve.name_patterns import matches
from rora_serve.preload import PreloadPlan, make_plan
from rora_serve.probing import base_in_build

# How a version's probe came out when a server last asked it of this base model. "not asked": none
# did, and the first one will; "none": it brings no probe.
ProbeState = Literal["passed", "quarantined", "lifted", "not asked", "none"]


@dataclass(frozen=True)
class CheckedVersion:
    """What a server would make of a version of a name.

    Args:
        resolved: which one.
        aliases: that mean it, `latest` first.
        probe: how that came out.
        refusal: why it would not be served, or None.
    """

    resolved: ResolvedVersion
    aliases: tuple[str, ...]
    probe: ProbeState
    refusal: str | None


@dataclass(frozen=True)
class Deployment:
    """What a server would find.

    Args:
        base: model that it would run.
        versions: that were checked, by name.
        num_unchecked: versions that no alias means, so that only their digest names them.
        plan: what it would have in memory before it is ready.
        capacity: bytes that adapters may take in memory.
        problems: what stops its start, or leaves a name out.
        warnings: what is no mistake and yet worth a look.
    """

    base: ServedBase
    versions: tuple[CheckedVersion, ...]
    num_unchecked: int
    plan: PreloadPlan
    capacity: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def refused(self) -> tuple[CheckedVersion, ...]:
        """Versions that it would not serve."""
        return tuple(checked for checked in self.versions if checked.refusal is not None)

    @property
    def num_bytes(self) -> int:
        """Bytes in memory of all versions that it would serve; shared weights count once."""
        served = {
            checked.resolved.version.weights_digest: checked.resolved.version.num_bytes
            for checked in self.versions
            if checked.refusal is None
        }
        return sum(served.values())

    @property
    def fits_at_once(self) -> bool:
        """Whether none of them would ever have to make room for another."""
        return self.num_bytes <= self.capacity

    @property
    def is_right(self) -> bool:
        """Whether the server would start, and serve every version that was checked."""
        return not self.problems and not self.refused


def check_deployment(
    config: ServeConfig,
    model: Path,
    base_names: Sequence[str],
    *,
    all_versions: bool,
    progress: Callable[[int, int], object],
) -> Deployment:
    """Return what a server would make of its store, key file and settings.

    Args:
        config: its settings.
        model: folder of the base model.
        base_names: what requests would call that.
        all_versions: check those too that no alias means.
        progress: told how many of how many versions are checked.
    Raises: BaseModelError: there is no such base model.
    Cost: reads every adapter that is checked three times.
    """
    base, shapes = read_base(model, base_names)
    store = AdapterStore(config.store)
    capacity = adapter_memory(config.adapter_memory_bytes, model)
    plan = make_plan(
        store, preload=config.preload, pin=config.pin, base_names=base_names, capacity=capacity
    )
    records, problems = _records(store)
    problems += _clashes(store, base_names)
    problems += plan.problems
    warnings = [f"{setting}: matches no adapter" for setting in plan.idle]
    if not store.root.is_dir():
        warnings.append(f"--store {store.root}: no such folder, only the base model is served")
    key_problems, key_warnings = _check_keys(config.keys, [record.name for record in records])

    wanted = {_key(one.resolved) for one in plan.wanted}
    versions = [
        (store.resolved(record.name, version), _aliases(record, version.digest))
        for record in records
        for version in record.versions
    ]
    chosen = [
        (resolved, aliases)
        for resolved, aliases in versions
        if aliases or all_versions or _key(resolved) in wanted
    ]
    checks = _Checks(store, base, shapes, capacity=capacity, plan=plan)
    checked: list[CheckedVersion] = []
    for resolved, aliases in chosen:
        progress(len(checked), len(chosen))
        probe, refusal = checks.outcome(resolved)
        checked.append(CheckedVersion(resolved, aliases, probe, refusal))
    return Deployment(
        base,
        tuple(checked),
        len(versions) - len(chosen),
        plan,
        capacity,
        (*problems, *key_problems),
        (*warnings, *key_warnings),
    )


def _records(store: AdapterStore) -> tuple[list[NameRecord], list[str]]:
    """Return every name that can be read, and what is wrong with the others."""
    records, problems = [], []
    for name in store.every_name():
        try:
            records.append(store.record(name))
        except RoraError as error:
            problems.append(str(error))
    return records, problems


def _clashes(store: AdapterStore, base_names: Sequence[str]) -> Iterator[str]:
    try:
        check_names(base_names, store)
    except AdapterNameError as error:
        yield str(error)


def _check_keys(path: Path | None, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what is wrong with a key file, and what of it is worth a look.

    That is a pattern that matches no name, unless its tenant may upload such names.
    """
    if path is None:
        return [], []
    try:
        tenants = [tenant for tenant, _ in read_tenants(path, cache_secret=b"")]
    except ConfigError as error:
        return [str(error)], []
    exposure = exposed(path)
    warnings = [] if exposure is None else [exposure]
    warnings += [
        f"{path}: tenants.{tenant.name}.{right}: {pattern!r} matches no adapter"
        for tenant in tenants
        for right, patterns in (("use", tenant.use), ("manage", tenant.manage))
        for pattern in patterns
        if pattern not in tenant.upload and not any(matches(pattern, name) for name in names)
    ]
    return [], warnings


class _Checks:
    """Asks what a server asks before it serves a version, once for each."""

    def __init__(
        self,
        store: AdapterStore,
        base: ServedBase,
        shapes: BaseShapes,
        *,
        capacity: int,
        plan: PreloadPlan,
    ) -> None:
        self._store = store
        self._base = base
        self._shapes = shapes
        self._left = capacity - plan.pinned_bytes
        self._pinned = {_key(one.resolved) for one in plan.wanted if one.is_pinned}
        self._found: dict[str, tuple[ProbeState, str | None]] = {}  # by digest
        self._templates = TemplateProcess()

    def outcome(self, resolved: ResolvedVersion) -> tuple[ProbeState, str | None]:
        """Return how a version's probe came out, and why it would not be served, or None."""
        digest = resolved.version.digest
        if digest not in self._found:
            self._found[digest] = self._ask(resolved)
        probe, refusal = self._found[digest]
        if refusal is None and _key(resolved) not in self._pinned:
            refusal = _told(resolved, lambda: check_fits(resolved.version.num_bytes, self._left))
        return probe, refusal

    def _ask(self, resolved: ResolvedVersion) -> tuple[ProbeState, str | None]:
        probe: ProbeState = "none"

        def ask() -> None:
            nonlocal probe
            template = self._base.check(resolved)
            if template is not None:
                self._templates.read(template).result()
            verify(resolved)
            describe_fitting(resolved.folder, self._shapes)
            if read_probe(resolved.folder) is not None:
                probe = "not asked"

        refusal = _told(resolved, ask)
        record = self._store.probe_record(resolved.version.digest)
        state, reason = _verdict(record, self._base.fingerprint)
        return state or probe, refusal or reason


def _verdict(record: ProbeRecord, fingerprint: str) -> tuple[ProbeState | None, str | None]:
    """Return what the last engine that ran this base model said of a probe, and its reason.

    Another engine would ask again; that it answers otherwise is not to be expected.
    """
    if record.lifted is not None:
        return "lifted", None
    last = base_in_build(fingerprint)
    builds = [build for build in record.verdicts if build.endswith(last)]
    if not builds:
        return None, None
    reason = record.quarantine(builds[-1])
    if reason is None:
        return "passed", None
    return "quarantined", f"quarantined: {reason} ({builds[-1]})"


def _told(resolved: ResolvedVersion, check: Callable[[], object]) -> str | None:
    """Return what a check has to say against a version, or None."""
    try:
        check()
    except ArtifactError as error:
        text = describe(error.problems) if error.problems else str(error)
        return without_place(text, resolved.folder)
    except RoraError as error:
        return str(error)
    return None


def _aliases(record: NameRecord, digest: str) -> tuple[str, ...]:
    found = [alias for alias, meant in record.aliases.items() if meant == digest]
    return tuple(sorted(found, key=lambda alias: (alias != LATEST, alias)))


def _key(resolved: ResolvedVersion) -> tuple[str, str]:
    return resolved.name, resolved.version.digest
