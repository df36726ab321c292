"""The command rora-train probe: its flags, and what it prints."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.base_model import cache_folder, find_model, model_name
from adapters.command import FAILED
from adapters.display import table
from adapters.errors import ArtifactError
from adapters.probe import Answer, Probe, read_probe
from adapters.verdict import ProbeVerdict, compare, to_json
from adapters.verdict_files import ProbeRecord

_DESCRIPTION = """\
Ask an adapter's probe again, offline.

Base model and adapter are loaded as for training, and answer the prompts that rora.json holds. With
--store what the server saw stands beside it, so that it shows which side moved: the base model, the
adapter, or the engine.
"""
_MAX_SHOWN = 60  # characters of a prompt


def add_probe_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `rora-train probe` to the program's commands."""
    parser = commands.add_parser(
        "probe",
        help="ask an adapter's probe again, beside what training and server saw",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "adapter", metavar="ADAPTER", help="adapter folder; with --store also a name, as in `model`"
    )
    parser.add_argument(
        "--store", type=Path, metavar="DIR", help="the server's store, with what it saw"
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help="base model: folder or hub name; default: SmolLM2-135M-Instruct",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(action=_probe)


@dataclass(frozen=True)
class _Sides:
    """A probe, and how it came out.

    Args:
        here: by the trainer's own model.
        record: in servers, by build.
    """

    probe: Probe
    here: ProbeVerdict
    record: ProbeRecord

    @property
    def moved(self) -> str:
        """Which side does not answer as in training."""
        here, server = self.here, self.record.newest
        if not here.tolerance.allows(here.base):
            return "the base model: it does not answer as in training here either"
        if not here.passed:
            return "the adapter: its files do not answer as in training here either"
        if server is None or server.passed:
            return "nothing"
        if not server.tolerance.allows(server.base):
            return "the engine: its base model does not answer as in training, here it does"
        return "the engine: it does not answer as the adapter's files do here"


def _probe(arguments: argparse.Namespace) -> int:
    from adapters import AdapterStore, open_artifact, version_digest, weights_digest  # noqa: PLC0415
    from trainer.inject import check_base, inject_artifact  # noqa: PLC0415  (imports torch)
    from trainer.model import load_base  # noqa: PLC0415
    from trainer.probe import ask_again  # noqa: PLC0415

    store = None if arguments.store is None else AdapterStore(arguments.store)
    folder = Path(arguments.adapter)
    if store is not None and not folder.is_dir():
        folder = store.resolve(arguments.adapter).folder
    artifact, probe = open_artifact(folder), read_probe(folder)
    if probe is None:
        raise ArtifactError(
            f"{folder}: rora.json holds no probe, one is expected; `rora-train run` writes it"
        )
    name = model_name(arguments.model)
    base_folder = find_model(arguments.model, cache=cache_folder(os.environ))
    check_base(folder, base_folder, name)
    base = load_base(name, base_folder, dtype=probe.dtype, load_in_4bit=probe.is_quantized)
    layers = inject_artifact(base.model, artifact)
    here = compare(probe, ask_again(base, layers, probe), probe.form)
    record = ProbeRecord()
    if store is not None:
        record = store.probe_record(version_digest(weights_digest(artifact), folder))
    sides = _Sides(probe, here, record)
    if arguments.json:
        print(json.dumps(_content(folder, sides)))
    else:
        print(_text(sides, base.tokenizer.decode))
    return 0 if here.passed else FAILED


def _content(folder: Path, sides: _Sides) -> dict[str, object]:
    record = sides.record
    return {
        "adapter": str(folder),
        "moved": sides.moved,
        "prompts": [asdict(prompt) for prompt in sides.probe.prompts],
        "here": to_json(sides.here),
        "servers": {build: to_json(verdict) for build, verdict in record.verdicts.items()},
        "lifted": None if record.lifted is None else asdict(record.lifted),
    }


def _text(sides: _Sides, decode: Callable[[list[int]], object]) -> str:
    """Return a table for each prompt, and which side moved."""
    lines = []
    server = sides.record.newest
    for number, prompt in enumerate(sides.probe.prompts):
        end = str(decode(list(prompt.token_ids)))[-_MAX_SHOWN:]
        lines.append(f"prompt {number + 1}, {len(prompt.token_ids)} tokens, ends with {end!r}")
        here = sides.here.seen[number]
        there = server.seen[number] if server and number < len(server.seen) else None
        for side, answer, columns in (
            ("base model", prompt.base, [here.base, *([there.base] if there else [])]),
            ("adapter", prompt.adapter, [here.adapter, *([there.adapter] if there else [])]),
        ):
            lines += [_table(side, answer, columns, decode), ""]
    lines.append(f"here    {sides.here.reason}")
    lines += [f"server  {verdict.reason} ({b})" for b, verdict in sides.record.verdicts.items()]
    if sides.record.lifted is not None:
        lines.append(f"lifted  by {sides.record.lifted.by}: it is served all the same")
    return "\n".join([*lines, f"moved   {sides.moved}"])


def _table(
    side: str,
    answer: Answer,
    columns: Sequence[tuple[float, ...]],
    decode: Callable[[list[int]], object],
) -> str:
    header = [side, "stored", "here", "server"][: 2 + len(columns)]
    rows = [
        [repr(str(decode([token]))), f"{stored:.6f}"]
        + [f"{column[at]:.6f}" if column else "-" for column in columns]
        for at, (token, stored) in enumerate(zip(answer.token_ids, answer.log_probs, strict=True))
    ]
    return table(header, rows)
