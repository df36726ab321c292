"""The command rora-adapters: looking at adapters and changing them; its store part is store_cli."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters.command import FAILED, run_command
from adapters.store_cli import (
    MODEL,
    PROGRAM,
    SOURCE,
    add_command,
    add_store_commands,
    print_json,
    read_base,
)


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
        print_json(descriptions)
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from adapters.display import receipt_text  # noqa: PLC0415
    from adapters.errors import ArtifactError  # noqa: PLC0415
    from adapters.receipt import receipt, to_json  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415
    from adapters.validation import validate  # noqa: PLC0415

    base = read_base(arguments.model)
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
            if not error.problems:
                raise
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
        print_json(reports)
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
        print_json({**asdict(found), **totals})
    else:
        print(compaction_text(found))
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from adapters.convert import convert  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415

    base, source = read_base(arguments.model), Path(arguments.path)
    if source.suffix == ".safetensors" and not source.is_dir():
        notes = convert(source, arguments.output, base=base)
    else:
        with open_source(arguments.path) as folder:
            notes = convert(folder, arguments.output, base=base)
    if arguments.json:
        print_json({"output": str(arguments.output), "notes": notes})
    else:
        print("\n".join([*notes, str(arguments.output)]))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from adapters.artifact import open_artifact  # noqa: PLC0415
    from adapters.diff import diff  # noqa: PLC0415
    from adapters.display import difference_text  # noqa: PLC0415
    from adapters.sources import open_source  # noqa: PLC0415

    with open_source(arguments.first) as first, open_source(arguments.second) as second:
        found = diff(open_artifact(first), open_artifact(second))
    if arguments.json:
        print_json(asdict(found))
    else:
        print(difference_text(found))
    return 0


# The parser.


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Look at adapters, make them smaller, keep them in a store."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    inspect = add_command(
        commands, "inspect", _inspect, "ranks, scalings and sizes, with a picture"
    )
    inspect.add_argument("path", nargs="+", metavar="PATH", help=SOURCE)
    inspect.add_argument("--norms", action="store_true", help="read the weights: |delta| of each")

    validate = add_command(
        commands, "validate", _validate, "every broken rule at once, with its code"
    )
    validate.add_argument("path", nargs="+", metavar="PATH", help=SOURCE)
    validate.add_argument("--model", metavar="M", help=f"also say what it matches in this {MODEL}")

    compact = add_command(commands, "compact", _compact, "the same deltas from fewer ranks")
    compact.add_argument("path", metavar="PATH", help=SOURCE)
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

    convert = add_command(commands, "convert", _convert, "another layout to an adapter folder")
    convert.add_argument("path", metavar="PATH", help=f"one .safetensors file, or {SOURCE}")
    convert.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    convert.add_argument("--model", metavar="M", help=MODEL)

    diff = add_command(commands, "diff", _diff, "rank, norm and cosine of two adapters' deltas")
    diff.add_argument("first", metavar="PATH", help=SOURCE)
    diff.add_argument("second", metavar="PATH", help=SOURCE)

    for command in (inspect, validate, compact, convert, diff):
        command.add_argument("--json", action="store_true", help="print one JSON document")
    add_store_commands(commands.add_parser("store", help="names, versions and aliases"))
    return parser
