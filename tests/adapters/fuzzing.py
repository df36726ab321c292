"""Mutated adapter folders and archives from a seed, and what they may do: be right, or be refused.

A seed gives the same input for ever, so a failing one is kept by its number in `SEEDS`.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from adapters.compact import compact_to_error
from adapters.digest import version_digest, weights_digest
from adapters.display import described, described_text
from adapters.errors import RoraError
from adapters.sources import open_source
from adapters.validation import validate
from tests.adapters.hostile.build import (
    CONFIG,
    PROBE,
    WEIGHTS,
    right,
    right_files,
    write_tar,
    write_zip,
)

# Inputs that once raised an error outside our tree.
SEEDS: tuple[int, ...] = ()

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, 1e309,
    float("nan"), float("-inf"), "", "a", "F32", "BF16", "LORA", "all-linear", "q_proj", "(", ".*",
    "(?P<x>a)(?P=x)", "\ud800", "\x00", "é" * 50, [], [0], [1, 2], [[]], {}, {"a": 1}, {"": None},
    {"q_proj": 2}, {"(": 2}, {".*": "x"}, [2, 8], [0, 64], ["q_proj", 1],
)  # fmt: skip
KEYS = (
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "bias",
    "peft_type", "use_dora", "init_lora_weights", "base_model_name_or_path", "key_of_2030", "",
    "dtype", "shape", "data_offsets", "__metadata__", "probe", "base_model",
)  # fmt: skip


def run(folder: Path, seed: int) -> bool:
    """Make the input of `seed` in `folder`, check it, and tell whether it was accepted.

    Raises: anything outside our tree: the failure that is looked for.
    """
    source = make(folder / str(seed), random.Random(seed))
    try:
        with open_source(str(source)) as opened:
            found = validate(opened)
            if found.problems or found.artifact is None:
                return False
            version_digest(weights_digest(found.artifact), opened)
            described_text(found.artifact, described(found.artifact, norms=True))
            output = folder / f"{seed}.out"
            try:
                compact_to_error(found.artifact, output, max_error=0.1)
            finally:
                shutil.rmtree(output, ignore_errors=True)
    except RoraError:
        return False
    finally:
        remove(source)
    return True


def make(path: Path, rng: random.Random) -> Path:
    """Write a mutated adapter folder or archive; return where it is."""
    kind = rng.choice(("config", "header", "bytes", "provenance", "config", "header", "archive"))
    if kind == "archive":
        return _archive(path, rng)
    right(path)
    if kind == "config":
        _mutate_json(path / CONFIG, rng)
    elif kind == "provenance":
        content = {"format": 1, "probe": PROBE, "base_model": {}}
        (path / "rora.json").write_text(json.dumps(content))
        _mutate_json(path / "rora.json", rng)
    elif kind == "header":
        _mutate_header(path / WEIGHTS, rng)
    else:
        target = path / rng.choice((CONFIG, WEIGHTS))
        target.write_bytes(mutated_bytes(target.read_bytes(), rng))
    return path


def mutated_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat and insert bytes at a few places."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        action = rng.randrange(5)
        if action == 0 and at < len(changed):
            changed[at] = rng.randrange(256)
        elif action == 1:
            del changed[at : at + rng.choice((1, 8, 64, 1024))]
        elif action == 2:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
        elif action == 3:
            changed[at:at] = rng.choice((b"{", b"]", b'"', b"\\", b",", b"\xff", b"9" * 20))
        else:
            changed[: min(8, at)] = rng.randbytes(min(8, at))
    return bytes(changed)


def mutated(value: Any, rng: random.Random) -> Any:
    """Return JSON with one part of it, somewhere, made into something else."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        changed = dict(value)
        action = rng.randrange(4)
        if action == 0:
            del changed[key]
        elif action == 1:
            changed[rng.choice(KEYS)] = rng.choice(VALUES)
        else:
            changed[key] = mutated(value[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.7:
        return [mutated(part, rng) if rng.random() < 0.5 else part for part in value]
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
        return value + rng.choice((-1, 1, -4, 4, 2**32))
    return rng.choice(VALUES)


def _mutate_json(path: Path, rng: random.Random) -> None:
    value = json.loads(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        value = mutated(value, rng)
    text = json.dumps(value).encode()
    path.write_bytes(mutated_bytes(text, rng) if rng.random() < 0.2 else text)


def _mutate_header(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for _ in range(rng.randint(1, 3)):
        header = mutated(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.2:
        text = mutated_bytes(text, rng)
    length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**40, 2**64 - 1))
    path.write_bytes(length.to_bytes(8, "little") + text + data)


def _archive(path: Path, rng: random.Random) -> Path:
    files = right_files()
    if rng.random() < 0.5:
        path = path.with_suffix(".zip")
        write_zip(path, files)
    else:
        path = path.with_suffix(".tar")
        write_tar(path, files, mode=rng.choice(("w", "w:gz")))
    path.write_bytes(mutated_bytes(path.read_bytes(), rng))
    return path


def remove(path: Path) -> None:
    """Delete an input."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
