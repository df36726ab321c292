"""The command rora-adapters: looking at adapters, changing them, and the store, offline."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.command import FAILED, run_command
from adapters.errors import AdapterMismatchError
from adapters.names import LATEST, MIN_DIGEST_PREFIX, NameRecord
from adapters.store import AdapterStore

if TYPE_CHECKING:
    from adapters.receipt import BaseShapes

PROGRAM = "rora-adapters"
_SOURCE = "a folder, a .tar, .tar.gz or .zip of one, or owner/name[@revision] on the hub"
_MODEL = "base model: a folder or hub name; 'default' is the embedded SmolLM2-135M-Instruct"


def main(argv: list[str] | None = None) -> int:
    """Run rora-adapters. Returns: 0 done, 1 failed or refused, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    action: Callable[[argparse.Namespace], int] = arguments.run
    return run_command(PROGRAM, lambda: action(arguments))


# Looking at adapters. What is imported inside the functions keeps the others quick.


def _inspect(arguments: argparse.Namespace) -> int:
    from adapters.artifact import open_artifact  # noqa: PLC0415
    from adapters.display import described, described_text  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415

    descriptions = []
    for source in arguments.path:
        with open_source(source) as folder:
            artifact = open_artifact(folder)
            description = described(artifact, norms=arguments.norms)
            if not arguments.json:
                print(described_text(artifact, description), end="\n\n")
            descriptions.append({**description, "folder": source})
    if arguments.json:
        _print_json(descriptions)
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from adapters.display import receipt_text  # noqa: PLC0415
    from adapters.errors import ArtifactError  # noqa: PLC0415
    from adapters.receipt import receipt, to_json  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415
    from adapters.validation import validate  # noqa: PLC0415

    base = _base_shapes(arguments.model)
    reports = []
    for source in arguments.path:
        report: dict[str, Any] = {"path": source, "problems": [], "notes": []}
        text = ""
        try:
            with open_source(source) as folder:
                found = validate(folder)
                problems, notes = list(found.problems), found.notes
                if base is not None and found.artifact is not None and not problems:
                    matched = receipt(found.artifact, base)
                    problems += matched.problems
                    report["receipt"] = to_json(matched)
                    text = receipt_text(matched)
        except ArtifactError as error:
            problems, notes = list(error.problems), ()
        report["problems"] = [asdict(problem) for problem in problems]
        report["notes"] = list(notes)
        reports.append(report)
        if not arguments.json:
            print(f"{source}: {f'{len(problems)} problems' if problems else 'right'}")
            # A receipt lists its own.
            lines = [text] if text else [f"  {problem}" for problem in problems]
            print("\n".join([*lines, *(f"  note: {note}" for note in notes)]).rstrip())
    if arguments.json:
        _print_json(reports)
    return FAILED if any(report["problems"] for report in reports) else 0


def _compact(arguments: argparse.Namespace) -> int:
    from adapters.artifact import open_artifact  # noqa: PLC0415
    from adapters.compact import compact_to_budget, compact_to_error  # noqa: PLC0415
    from adapters.display import compaction_text  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415

    with open_source(arguments.path) as folder:
        artifact, output = open_artifact(folder), arguments.output
        if arguments.rank_budget is not None:
            found = compact_to_budget(artifact, output, rank_budget=arguments.rank_budget)
        else:
            found = compact_to_error(artifact, output, max_error=arguments.max_error)
    if arguments.json:
        totals = {"error": found.error, "largest_module_error": found.largest_error}
        _print_json({**asdict(found), **totals})
    else:
        print(compaction_text(found))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from adapters.convert import convert  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415

    base, source = _base_shapes(arguments.model), Path(arguments.path)
    if source.suffix == ".safetensors" and not source.is_dir():
        notes = convert(source, arguments.output, base=base)
    else:
        with open_source(arguments.path) as folder:
            notes = convert(folder, arguments.output, base=base)
    for note in notes:
        print(note)
    print(arguments.output)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from adapters.artifact import open_artifact  # noqa: PLC0415
    from adapters.diff import diff  # noqa: PLC0415
    from adapters.display import difference_text  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415

    with open_source(arguments.first) as first, open_source(arguments.second) as second:
        found = diff(open_artifact(first), open_artifact(second))
    if arguments.json:
        _print_json(asdict(found))
    else:
        print(difference_text(found))
    return 0


def _base_shapes(model: str | None) -> "BaseShapes | None":
    if model is None:
        return None
    from adapters.base_model import (  # noqa: PLC0415
        DEFAULT_MODEL_NAME,
        cache_folder,
        find_model,
        model_name,
    )
    from adapters.receipt import read_base_shapes  # noqa: PLC0415

    named = None if model in ("default", DEFAULT_MODEL_NAME) else model
    folder = find_model(named, cache=cache_folder(os.environ))
    return read_base_shapes(folder, name=model_name(named))


# The store.


def _add(arguments: argparse.Namespace) -> int:
    from adapters.sources import open_source  # noqa: PLC0415

    base = _base_shapes(arguments.model)
    with open_source(arguments.path) as folder:
        if base is not None:
            _check_fits(folder, base)
        added = _store(arguments).add(folder, name=arguments.name, alias=arguments.alias)
    print(f"{added.name}@sha256:{added.version.digest}")
    return 0


def _check_fits(folder: Path, base: "BaseShapes") -> None:
    from adapters.artifact import read_folder  # noqa: PLC0415
    from adapters.problems import refusal  # noqa: PLC0415
    from adapters.receipt import receipt  # noqa: PLC0415

    artifact, problems = read_folder(folder)
    if artifact is None or problems:
        return  # the store says what is wrong
    misfits = receipt(artifact, base).problems
    if misfits:
        raise refusal(AdapterMismatchError, f"{folder} on base model {base.name}", misfits)


def _list(arguments: argparse.Namespace) -> int:
    from adapters.display import table  # noqa: PLC0415

    store = _store(arguments)
    records = store.names()
    if arguments.json:
        _print_json([_record_json(record) for record in records])
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
    if arguments.json:
        history = [asdict(event) for event in events]
        _print_json({**_record_json(record), "history": history})
        return 0
    rows = []
    for version in reversed(record.versions):
        aliases = [alias for alias, digest in record.aliases.items() if digest == version.digest]
        aliases.sort(key=lambda alias: (alias != LATEST, alias))
        ranks, megabytes = f"{version.min_rank}-{version.max_rank}", version.num_bytes / 1e6
        aliased = ", ".join(aliases)
        rows.append(
            (_short(version.digest), ranks, f"{megabytes:.1f}", _date(version.added), aliased)
        )
    print(table(["version", "ranks", "MB", "added", "aliases"], rows), end="\n\n")
    moves = [
        (_date(event.at), event.action, event.alias, _short(event.digest) if event.digest else "-")
        for event in reversed(events)
    ]
    print(table(["when", "action", "alias", "version"], moves))
    return 0


def _alias(arguments: argparse.Namespace) -> int:
    moved = _store(arguments).set_alias(arguments.version, arguments.alias)
    print(f"{moved.name}@{arguments.alias} is {_short(moved.version.digest)}")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    name, _, alias = arguments.name.partition("@")
    moved = _store(arguments).rollback(name, *([alias] if alias else []))
    print(f"{arguments.name} is {_short(moved.version.digest)}")
    return 0


def _remove(arguments: argparse.Namespace) -> int:
    _store(arguments).remove(arguments.name, force=arguments.force)
    print(f"{arguments.name} is removed; `{PROGRAM} store gc` frees its space")
    return 0


def _gc(arguments: argparse.Namespace) -> int:
    store = _store(arguments)
    found = store.collect_garbage(keep_versions=arguments.keep, dry_run=arguments.dry_run)
    if arguments.json:
        _print_json(asdict(found))
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


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2))


# The parser.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Look at adapters, make them smaller, keep them in a store."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = _command(commands, "inspect", _inspect, "ranks, scalings and sizes, with a picture")
    inspect.add_argument("path", nargs="+", metavar="PATH", help=_SOURCE)
    inspect.add_argument("--norms", action="store_true", help="read the weights: |delta| of each")

    validate = _command(commands, "validate", _validate, "every broken rule at once, with its code")
    validate.add_argument("path", nargs="+", metavar="PATH", help=_SOURCE)
    validate.add_argument("--model", metavar="M", help=f"also say what it matches in this {_MODEL}")

    compact = _command(commands, "compact", _compact, "the same deltas from fewer ranks")
    compact.add_argument("path", metavar="PATH", help=_SOURCE)
    compact.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    how = compact.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--max-error",
        type=float,
        metavar="E",
        help="least ranks with |delta - new| / |delta| of each module at most this, as 1e-3",
    )
    how.add_argument(
        "--rank-budget",
        type=int,
        metavar="N",
        help="this many ranks in all, where the singular values are largest",
    )

    convert = _command(commands, "convert", _convert, "another layout to an adapter folder")
    convert.add_argument("path", metavar="PATH", help=f"one .safetensors file, or {_SOURCE}")
    convert.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    convert.add_argument("--model", metavar="M", help=_MODEL)

    diff = _command(commands, "diff", _diff, "rank, norm and cosine of two adapters' deltas")
    diff.add_argument("first", metavar="PATH", help=_SOURCE)
    diff.add_argument("second", metavar="PATH", help=_SOURCE)

    for command in (inspect, validate, compact, diff):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    _add_store_commands(commands.add_parser("store", help="names, versions and aliases"))
    return parser


def _add_store_commands(store: argparse.ArgumentParser) -> None:
    actions = store.add_subparsers(required=True, metavar="ACTION")
    version = "NAME, NAME@ALIAS or NAME@sha256:<12 or more digits>"

    add = _command(actions, "add", _add, "copy an adapter into the store under a name")
    add.add_argument("path", metavar="PATH", help=_SOURCE)
    add.add_argument("--name", required=True, help="what requests will name in `model`")
    add.add_argument("--alias", default="latest", help="alias to move to it; default: latest")
    add.add_argument("--model", metavar="M", help=f"refuse what does not fit this {_MODEL}")

    listing = _command(actions, "list", _list, "every name with its latest version")

    show = _command(actions, "show", _show, "a name's versions, aliases and history")
    show.add_argument("name", metavar="NAME")

    alias = _command(actions, "alias", _alias, "let an alias mean a version")
    alias.add_argument("version", metavar="VERSION", help=version)
    alias.add_argument("alias", metavar="ALIAS", help="as stable or canary; latest is one")

    rollback = _command(actions, "rollback", _rollback, "let an alias mean what it meant before")
    rollback.add_argument("name", metavar="NAME[@ALIAS]", help="default alias: latest")

    remove = _command(actions, "remove", _remove, "remove a name, a version of it or an alias")
    remove.add_argument("name", metavar="WHAT", help=version)
    remove.add_argument("--force", action="store_true", help="even if it is in use")

    collect = _command(actions, "gc", _gc, "delete versions that no name holds")
    collect.add_argument(
        "--keep",
        type=_count,
        metavar="N",
        help="also drop versions beyond the newest N of a name that no alias means",
    )
    collect.add_argument("--dry-run", action="store_true", help="only say what would be deleted")

    for action in (listing, show, collect):
        action.add_argument("--json", action="store_true", help="print one JSON document")
    for action in (add, listing, show, alias, rollback, remove, collect):
        action.add_argument(
            "--store", type=Path, default=Path("store"), metavar="DIR", help="default: ./store"
        )


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], what: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}."
    )
    parser.set_defaults(run=run)
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise ValueError
    return count
