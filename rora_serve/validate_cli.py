"""The command rora-serve validate: what would be served, as a table or as JSON."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from adapters.base_model import cache_folder, find_model, model_name
from adapters.command import FAILED
from adapters.display import table
from adapters.settings import with_hyphens
from rora_serve.config import ServeConfig, add_settings
from rora_serve.deployment import CheckedVersion, Deployment, check_deployment

_PROGRESS_SECONDS = 2.0
_MB = 1e6


def validate(argv: Sequence[str], vllm_options: Sequence[str]) -> int:
    """Print what a server with these arguments would serve.

    Args:
        argv: without the word `validate`.
        vllm_options: as given after `--`.
    Returns: 0 it would start and serve all of it, 1 something is refused or wrong.
    Raises: ConfigError: settings that are wrong by themselves; BaseModelError: no base model.
    """
    parser = argparse.ArgumentParser(
        prog="rora-serve validate",
        description="Say what a server with these settings would serve, what it would refuse and "
        "why, and the bytes it takes; without an engine.",
        epilog="Of options after `--`, which a server gives to vLLM, --served-model-name counts.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--all-versions",
        action="store_true",
        help="check versions too that no alias means, so that only a digest names them",
    )
    read_config = add_settings(parser)
    arguments = parser.parse_args(with_hyphens(argv))
    config = read_config(arguments)
    model = find_model(config.model, cache=cache_folder(os.environ))
    found = check_deployment(
        config,
        model,
        _served_names(vllm_options, model_name(config.model)),
        all_versions=arguments.all_versions,
        progress=_progress(),
    )
    if arguments.json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        print(_in_words(found, config))
    return 0 if found.is_right else FAILED


def _served_names(vllm_options: Sequence[str], base_name: str) -> list[str]:
    parser = argparse.ArgumentParser(prog="rora-serve validate [..] --", add_help=False)
    parser.add_argument("--served-model-name", nargs="+", default=[base_name])
    names: list[str] = parser.parse_known_args(with_hyphens(vllm_options))[0].served_model_name
    return names


def _progress() -> Callable[[int, int], None]:
    """Return what tells how far it is, now and then."""
    told = time.monotonic()

    def tell(num_done: int, num_all: int) -> None:
        nonlocal told
        if time.monotonic() - told >= _PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"{num_done} of {num_all} versions checked", file=sys.stderr)

    return tell


def _in_words(found: Deployment, config: ServeConfig) -> str:
    rows = [_row(checked) for checked in found.versions]
    parts = []
    if rows:
        parts.append(table(["version", "aliases", "ranks", "MB", "probe", ""], rows))
    lines = [f"refused: {one.resolved.public_id}: {one.refusal}" for one in found.refused]
    lines += [f"wrong: {problem}" for problem in found.problems]
    lines += [f"note: {warning}" for warning in found.warnings]
    if lines:
        parts.append("\n".join(lines))
    parts.append("\n".join(_totals(found, config)))
    return "\n\n".join(parts)


def _row(checked: CheckedVersion) -> Sequence[object]:
    version = checked.resolved.version
    return (
        checked.resolved.public_id,
        ", ".join(checked.aliases) or "-",
        f"{version.min_rank}-{version.max_rank}",
        f"{version.num_bytes / _MB:.1f}",
        checked.probe,
        "served" if checked.refusal is None else "refused",
    )


def _totals(found: Deployment, config: ServeConfig) -> list[str]:
    num_refused, plan = len(found.refused), found.plan
    whence = "" if config.adapter_memory_bytes else ", a quarter of what is free here now"
    fits = "all fit at once" if found.fits_at_once else "the least recently used makes room"
    lines = [
        f"served by {found.base.names[0]}: {len(found.versions) - num_refused} versions, "
        f"{found.num_bytes / _MB:.1f} MB; refused: {num_refused}",
        f"memory for adapters: {found.capacity / _MB:.1f} MB{whence}; {fits}",
    ]
    if found.num_unchecked:
        lines.append(
            f"not checked, since no alias means them: {found.num_unchecked}; see --all-versions"
        )
    if config.preload or config.pin:
        num_pinned = sum(wanted.is_pinned for wanted in plan.wanted)
        lines.append(
            f"loaded before the server is ready: {len(plan.wanted)}, of which pinned: "
            f"{num_pinned}, {plan.pinned_bytes / _MB:.1f} MB; no room for: {plan.num_left_out}"
        )
    return lines


def _as_json(found: Deployment) -> dict[str, Any]:
    wanted = found.plan.wanted
    return {
        "base": {"names": list(found.base.names), "fingerprint": found.base.fingerprint},
        "versions": [_version_json(checked) for checked in found.versions],
        "problems": list(found.problems),
        "warnings": list(found.warnings),
        "preload": [one.resolved.public_id for one in wanted if not one.is_pinned],
        "pin": [one.resolved.public_id for one in wanted if one.is_pinned],
        "totals": {
            "served": len(found.versions) - len(found.refused),
            "refused": len(found.refused),
            "unchecked": found.num_unchecked,
            "num_bytes": found.num_bytes,
            "adapter_memory_bytes": found.capacity,
            "pinned_bytes": found.plan.pinned_bytes,
            "left_out_of_preload": found.plan.num_left_out,
            "fits_at_once": found.fits_at_once,
        },
    }


def _version_json(checked: CheckedVersion) -> dict[str, Any]:
    version = checked.resolved.version
    return {
        "name": checked.resolved.name,
        "version": f"sha256:{version.digest}",
        "aliases": list(checked.aliases),
        "rank": {"min": version.min_rank, "max": version.max_rank},
        "num_bytes": version.num_bytes,
        "probe": checked.probe,
        "is_served": checked.refusal is None,
        "refusal": checked.refusal,
    }
