"""The command rora-train: run, validate, resume, evaluate; merge and probe stand beside it."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.base_model import cache_folder, find_model, model_name
from adapters.command import run_command
from adapters.settings import add_flags, read_settings, with_hyphens
from trainer.config import TrainConfig
from trainer.merge_cli import add_merge_command
from trainer.probe_cli import add_probe_command

if TYPE_CHECKING:
    from trainer.model import BaseModel

PROGRAM = "rora-train"


def main(argv: list[str] | None = None) -> int:
    """Run rora-train. Returns: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Train LoRA and RoRA adapters of one base model."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_config_command(
        commands, "run", "train; writes OUTPUT/adapter, log.jsonl, report.html, checkpoints", _run
    )
    _add_config_command(
        commands, "validate", "report every mistake in config and data; show one batch", _validate
    )
    resumption = commands.add_parser(
        "resume", help="go on exactly where a run stopped", description=_resume.__doc__
    )
    resumption.add_argument("run", type=Path, metavar="RUN_DIR", help="output folder of the run")
    resumption.set_defaults(action=lambda arguments: _resume(arguments.run))
    evaluation = commands.add_parser(
        "evaluate", help="loss and accuracy with and without an adapter"
    )
    evaluation.add_argument("adapter", type=Path, help="adapter folder")
    evaluation.add_argument("--data", required=True, help="JSON-lines file, as data.train")
    evaluation.add_argument("--model", help="base model; default: SmolLM2-135M-Instruct")
    evaluation.add_argument("--limit", type=_positive, help="use the first lines only")
    evaluation.add_argument(
        "--batch-tokens", type=_positive, default=2048, help="tokens of a forward; default: 2048"
    )
    evaluation.add_argument("--json", action="store_true", help="print one JSON object")
    evaluation.set_defaults(action=_evaluate)
    add_merge_command(commands)
    add_probe_command(commands)
    arguments = parser.parse_args(with_hyphens(sys.argv[1:] if argv is None else argv))
    return run_command(PROGRAM, lambda: arguments.action(arguments))


def _add_config_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    description: str,
    action: Callable[[TrainConfig], int],
) -> None:
    parser = commands.add_parser(name, help=description, description=description)
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="settings of the run")
    read_flags = add_flags(parser, TrainConfig)

    def read_and_act(arguments: argparse.Namespace) -> int:
        return action(read_settings(TrainConfig, arguments.config, read_flags(arguments)))

    parser.set_defaults(action=read_and_act)


def _run(config: TrainConfig) -> int:
    from trainer.distributed import started  # noqa: PLC0415  (imports torch)
    from trainer.run import train  # noqa: PLC0415
    from trainer.run_folder import check_output  # noqa: PLC0415

    with started(os.environ) as processes:
        if processes.is_first:
            check_output(config.output)
        folder = train(config, _load_base(config), processes)
        if processes.is_first:
            print(folder)
    return 0


def _resume(run_folder: Path) -> int:
    """Go on where the last checkpoint of a run stands; the outcome is that of an unstopped run."""
    from trainer.distributed import started  # noqa: PLC0415  (imports torch)
    from trainer.run import resume  # noqa: PLC0415
    from trainer.run_folder import read_run_config  # noqa: PLC0415

    config = read_run_config(run_folder)
    with started(os.environ) as processes:
        folder = resume(run_folder, _load_base(config), processes)
        if processes.is_first:
            print(folder)
    return 0


def _load_base(config: TrainConfig) -> "BaseModel":
    from trainer.model import load_base  # noqa: PLC0415  (imports torch)

    return load_base(
        model_name(config.model),
        find_model(config.model, cache=cache_folder(os.environ)),
        dtype=config.train.dtype,
        load_in_4bit=config.train.load_in_4bit,
    )


def _validate(config: TrainConfig) -> int:
    from trainer.validate import validate  # noqa: PLC0415  (imports torch)

    folder = find_model(config.model, cache=cache_folder(os.environ))
    has_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(validate(config, folder, bold=has_colours and os.environ.get("TERM") != "dumb"))
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from adapters import open_artifact  # noqa: PLC0415
    from trainer.data import tokenize  # noqa: PLC0415
    from trainer.dataset import read_eval_set  # noqa: PLC0415
    from trainer.evaluate import evaluate_both  # noqa: PLC0415  (imports torch)
    from trainer.inject import check_base, inject_artifact  # noqa: PLC0415
    from trainer.model import load_base, max_positions  # noqa: PLC0415
    from trainer.trial import find_model_loss  # noqa: PLC0415

    artifact = open_artifact(arguments.adapter)
    folder = find_model(arguments.model, cache=cache_folder(os.environ))
    check_base(artifact.folder, folder, model_name(arguments.model))
    base = load_base(model_name(arguments.model), folder, dtype="auto")
    examples, num_too_long = read_eval_set(
        arguments.data,
        base.tokenizer,
        limit=arguments.limit,
        max_positions=max_positions(base.model),
    )
    if num_too_long:
        print(f"{num_too_long} samples left out: longer than the model takes", file=sys.stderr)
    longest = max(len(tokenize(example, base.tokenizer)) for example in examples)
    loss, _ = find_model_loss(base, longest=longest, packing=True)
    layers = inject_artifact(base.model, artifact)
    adapter, alone = evaluate_both(
        loss,
        examples,
        layers,
        batch_tokens=arguments.batch_tokens,
    )
    if arguments.json:
        print(json.dumps({"base": vars(alone), "adapter": vars(adapter)}))
        return 0
    print(f"{adapter.num_samples} samples" + (f", answers by {adapter.by}" if adapter.by else ""))
    print(f"{'':8}  {'loss':>7}  accuracy")
    for name, result in (("base", alone), ("adapter", adapter)):
        accuracy = "-" if result.accuracy is None else f"{result.accuracy:.1%}"
        print(f"{name:8}  {result.loss:7.4f}  {accuracy:>8}")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number
