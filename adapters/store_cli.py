"""The command rora-adapters store, and what the other commands share with it."""

import argparse
import getpass
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterNameError
from adapters.names import DEFAULT_MODEL_NAME, LATEST, MIN_DIGEST_PREFIX, NameRecord
from adapters.store import AdapterStore
from adapters.verdict_files import ProbeRecord

if TYPE_CHECKING:
    from adapters.receipt import BaseShapes

PROGRAM = "rora-adapters"
SOURCE = "a folder, a .tar, .tar.gz or .zip of one, or owner/name[@revision] on the hub"
MODEL = "base model: a folder or hub name; 'default' is the embedded SmolLM2-135M-Instruct"


def add_store_commands(store: argparse.ArgumentParser) -> None:
    """Add what `rora-adapters store` can do to its parser."""
    actions = store.add_subparsers(required=True, metavar="ACTION")
    version = "NAME, NAME@ALIAS or NAME@sha256:<12 or more digits>"

    add = add_command(actions, "add", _add, "copy an adapter into the store under a name")
    add.add_argument("path", metavar="PATH", help=SOURCE)
    add.add_argument("--name", required=True, help="what requests will name in `model`")
    add.add_argument("--alias", default="latest", help="alias to move to it; default: latest")
    add.add_argument("--model", metavar="M", help=f"refuse what does not fit this {MODEL}")

    listing = add_command(actions, "list", _list, "every name with its latest version")

    show = add_command(actions, "show", _show, "a name's versions, aliases, probes and history")
    show.add_argument("name", metavar="NAME")

    alias = add_command(actions, "alias", _alias, "let an alias mean a version")
    alias.add_argument("version", metavar="VERSION", help=version)
    alias.add_argument("alias", metavar="ALIAS", help="as stable or canary; latest is one")

    rollback = add_command(actions, "rollback", _rollback, "let an alias mean what it meant before")
    rollback.add_argument("name", metavar="NAME[@ALIAS]", help="default alias: latest")

    remove = add_command(actions, "remove", _remove, "remove a name, a version of it or an alias")
    remove.add_argument("name", metavar="WHAT", help=version)
    remove.add_argument("--force", action="store_true", help="even if it is in use")

    lift = add_command(
        actions, "lift", _lift, "let a version be served whatever a server said of its probe"
    )
    lift.add_argument("version", metavar="VERSION", help=version)

    collect = add_command(actions, "gc", _gc, "delete versions that no name holds")
    collect.add_argument(
        "--keep",
        type=_count,
        metavar="N",
        help="also drop versions beyond the newest N of a name that no alias means",
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would be deleted")

    for action in (listing, show, collect):
        action.add_argument("--json", action="store_true", help="print one JSON document")
    for action in (add, listing, show, alias, rollback, remove, lift, collect):
        action.add_argument(
            "--store", type=Path, default=Path("store"), metavar="DIR", help="default: ./store"
        )


def _add(arguments: argparse.Namespace) -> int:
    from adapters.sources import open_source  # noqa: PLC0415

    base = read_base(arguments.model)
    with open_source(arguments.path) as folder:
        if base is not None:
            if arguments.name == base.name:
                raise AdapterNameError(f"adapter name {base.name!r}: it is the base model's")
            _check_fits(folder, base)
        added = _store(arguments).add(folder, name=arguments.name, alias=arguments.alias)
    print(f"{added.name}@sha256:{added.version.digest}")
    return 0


def _check_fits(folder: Path, base: "BaseShapes") -> None:
    from adapters.artifact import read_folder  # noqa: PLC0415
    from adapters.receipt import receipt  # noqa: PLC0415

    artifact, problems = read_folder(folder)
    if artifact is None or problems:
        return  # the store says what is wrong
    receipt(artifact, base).check()


def _list(arguments: argparse.Namespace) -> int:
    from adapters.display import table  # noqa: PLC0415

    store = _store(arguments)
    records = store.names()
    if arguments.json:
        print_json([_record_json(record) for record in records])
        return 0
    if not records:
        print(f"{store.root}: no adapter yet; add one with `{PROGRAM} store add`", file=sys.stderr)
        return 0
    rows = []
    for record in records:
        latest = record.latest
        rows.append(
            (
                record.name,
                _short(latest.digest),
                len(record.versions),
                f"{latest.min_rank}-{latest.max_rank}",
                f"{latest.num_bytes / 1e6:.1f}",
                _date(latest.added),
            )
        )
    print(table(["name", "latest", "versions", "ranks", "MB", "added"], rows))
    return 0


def _record_json(record: NameRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "aliases": record.aliases,
        "versions": [version._asdict() for version in record.versions],
    }


def _show(arguments: argparse.Namespace) -> int:
    from adapters.display import table  # noqa: PLC0415

    store = _store(arguments)
    record, events = store.record(arguments.name), store.history(arguments.name)
    probes = {version.digest: store.probe_record(version.digest) for version in record.versions}
    if arguments.json:
        history = [asdict(event) for event in events]
        found = {digest: asdict(probe) for digest, probe in probes.items()}
        print_json({**_record_json(record), "probes": found, "history": history})
        return 0
    rows = []
    for version in reversed(record.versions):
        aliases = [alias for alias, digest in record.aliases.items() if digest == version.digest]
        aliases.sort(key=lambda alias: (alias != LATEST, alias))
        ranks, megabytes = f"{version.min_rank}-{version.max_rank}", version.num_bytes / 1e6
        aliased = ", ".join(aliases)
        size, state = f"{megabytes:.1f}", _probe_state(probes[version.digest])
        rows.append((_short(version.digest), ranks, size, _date(version.added), state, aliased))
    print(table(["version", "ranks", "MB", "added", "probe", "aliases"], rows), end="\n\n")
    lines = [f"{_short(d)}  {line}" for d, probe in probes.items() for line in _probe_lines(probe)]
    if lines:
        print("\n".join(lines), end="\n\n")
    moves = [
        (_date(event.at), event.action, event.alias, _short(event.digest) if event.digest else "-")
        for event in reversed(events)
    ]
    print(table(["when", "action", "alias", "version"], moves))
    return 0


def _probe_state(record: ProbeRecord) -> str:
    """Return how a version's probe came out, in a word, as the last server has it that asked it."""
    if record.lifted is not None:
        return "lifted"
    if record.newest is None:
        return "-"
    return "passed" if record.newest.passed else "quarantined"


def _probe_lines(record: ProbeRecord) -> list[str]:
    """Return why a version is or was quarantined, and who lifted that."""
    lines = [
        f"{verdict.reason} ({build})"
        for build, verdict in record.verdicts.items()
        if not verdict.passed
    ]
    if record.lifted is not None:
        lines.append(f"lifted by {record.lifted.by}, {_date(record.lifted.at)}")
    return lines


def _lift(arguments: argparse.Namespace) -> int:
    try:
        by = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        by = f"user {os.getuid()}"
    lifted = _store(arguments).lift_quarantine(arguments.version, by=by)
    print(f"{lifted.public_id} is served whatever its probe says")
    return 0


def _alias(arguments: argparse.Namespace) -> int:
    moved = _store(arguments).set_alias(arguments.version, arguments.alias)
    print(f"{moved.name}@{arguments.alias} is {_short(moved.version.digest)}")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    name, at, alias = arguments.name.partition("@")
    moved = _store(arguments).rollback(name, alias if at else LATEST)
    print(f"{arguments.name} is {_short(moved.version.digest)}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    _store(arguments).remove(arguments.name, force=arguments.force)
    is_alias = "@" in arguments.name and "@sha256:" not in arguments.name
    frees = "" if is_alias else f"; `{PROGRAM} store gc` frees its space"
    print(f"{arguments.name} is removed{frees}")
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    found = store.collect_garbage(keep_versions=arguments.keep, dry_run=arguments.dry_run)
    if arguments.json:
        print_json(asdict(found))
        return 0
    would = "would be " if arguments.dry_run else ""
    print(f"{len(found.digests)} versions {would}deleted, {found.num_bytes / 1e6:.1f} MB")
    if found.leased:
        print(f"{len(found.leased)} more are in use by a running server")
    return 0


def _store(arguments: argparse.Namespace) -> AdapterStore:
    return AdapterStore(arguments.store)


def _short(digest: str) -> str:
    return f"sha256:{digest[:MIN_DIGEST_PREFIX]}"


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M")


def print_json(content: object) -> None:
    """Print one JSON document."""
    print(json.dumps(content, indent=2))


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str
) -> argparse.ArgumentParser:
    """Add a command that calls `run`; return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}."
    )
    parser.set_defaults(run=run)
    return parser


def read_base(model: str | None) -> "BaseShapes | None":
    """Return the layers of the base model that --model names."""
    if model is None:
        return None
    from adapters.base_model import cache_folder, find_model, model_name  # noqa: PLC0415
    from adapters.receipt import read_base_shapes  # noqa: PLC0415

    named = None if model in ("default", DEFAULT_MODEL_NAME) else model
    folder = find_model(named, cache=cache_folder(os.environ))
    return read_base_shapes(folder, name=model_name(named))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: an integer of at least 0 is expected")
    return int(text)
