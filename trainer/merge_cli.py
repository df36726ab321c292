"""The command rora-train merge: its flags, and what it prints."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from adapters.base_model import cache_folder, find_model, model_name
from adapters.tolerance import BASE_FACTOR, TOLERANCES, Dtype

_DTYPES: tuple[Dtype, ...] = get_args(Dtype)
_TABLE = "\n".join(
    f"  {dtype:9} mean {TOLERANCES[dtype].mean:<8g} largest {TOLERANCES[dtype].largest:g}"
    for dtype in _DTYPES
)
_DESCRIPTION = f"""\
Write base model + adapter as one ordinary model folder.

W' = W + scaling * B·A is formed in float32 and rounded once. The folder is then loaded from disk,
and its log-probs are compared with those of the unmerged model in float32. It is kept only if they
are nearer to those than to the base model's, and differ by at most, in nats:

{_TABLE}

In 16 bits the mean may also be at most {BASE_FACTOR} times what that dtype does to the base model
alone, or a tenth of the above if that is more.
"""


def add_merge_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Add `rora-train merge` to the program's commands."""
    parser = commands.add_parser(
        "merge",
        help="write base model + adapter as one model folder, checked before it is kept",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="adapter folder")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="new or empty folder"
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="base model: folder or hub name; default: SmolLM2-135M-Instruct",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", *_DTYPES),
        default="auto",
        help="of the merged weights; default: auto, as the base model's files",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(action=_merge)


def _merge(arguments: argparse.Namespace) -> int:
    from trainer.merge import merge  # noqa: PLC0415  (imports torch)

    merged = merge(
        arguments.adapter,
        arguments.output,
        base_folder=find_model(arguments.model, cache=cache_folder(os.environ)),
        base_name=model_name(arguments.model),
        dtype=arguments.dtype,
        say=lambda line: print(line, file=sys.stderr),
    )
    if not arguments.json:
        print(merged.output)
        return 0
    base = merged.base_difference
    content = {
        "output": str(merged.output),
        "dtype": merged.dtype,
        "num_modules": merged.num_modules,
        "mean_difference": merged.difference.mean,
        "largest_difference": merged.difference.largest,
        "tolerance": asdict(merged.tolerance),
        "base_mean_difference": None if base is None else base.mean,
        "adapter_mean_effect": merged.effect.mean,
    }
    print(json.dumps(content))
    return 0
