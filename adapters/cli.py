"""The command rora-adapters: the store, offline."""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from adapters.command import run_command
from adapters.store import AdapterStore

PROGRAM = "rora-adapters"


def main(argv: list[str] | None = None) -> int:
    """Run rora-adapters. Returns: 0 done, 1 failed, 2 wrong usage."""
    arguments = _parser().parse_args(argv)
    store = AdapterStore(arguments.store)
    if arguments.action == "add":
        return run_command(PROGRAM, lambda: _add(store, arguments.folder, arguments.name))
    return run_command(PROGRAM, lambda: _list(store, as_json=arguments.json))


def _add(store: AdapterStore, folder: Path, name: str) -> int:
    added = store.add(folder, name=name)
    print(f"{added.name}@sha256:{added.version.digest}")
    return 0


def _list(store: AdapterStore, *, as_json: bool) -> int:
    records = store.names()
    if as_json:
        listing = [
            {
                "name": record.name,
                "aliases": record.aliases,
                "versions": [vars(version) for version in record.versions],
            }
            for record in records
        ]
        print(json.dumps(listing, indent=2))
        return 0
    if not records:
        print(f"{store.root}: no adapter yet; add one with `{PROGRAM} store add`", file=sys.stderr)
        return 0
    width = max(len("name"), *(len(record.name) for record in records))
    print(f"{'name':{width}}  {'latest':19}  versions  {'ranks':>7}  {'MB':>6}  added")
    for record in records:
        latest = record.latest
        added = datetime.fromtimestamp(latest.added, tz=UTC).strftime("%Y-%m-%d %H:%M")
        print(
            f"{record.name:{width}}  sha256:{latest.digest[:12]}  {len(record.versions):8}  "
            f"{f'{latest.min_rank}-{latest.max_rank}':>7}  {latest.num_bytes / 1e6:6.1f}  {added}"
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Keep adapters in a store.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    store = commands.add_parser("store", help="add adapters to a store, list what it holds")
    actions = store.add_subparsers(dest="action", required=True, metavar="ACTION")
    add = actions.add_parser("add", help="copy an adapter folder into the store under a name")
    add.add_argument("folder", type=Path, help="folder written by rora-train or PEFT")
    add.add_argument("--name", required=True, help="what requests will name in `model`")
    listing = actions.add_parser("list", help="names, versions and sizes")
    listing.add_argument("--json", action="store_true", help="print one JSON document")
    for action in (add, listing):
        action.add_argument(
            "--store", type=Path, default=Path("store"), metavar="DIR", help="default: ./store"
        )
    return parser
