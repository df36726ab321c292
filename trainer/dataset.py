"""TrainingData: files of examples -> samples, held-out sets, and what became of them.

Owns where files come from, truncation, duplicates and leaks; every mistake of every file is told at
once.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from adapters.errors import DataError
from trainer.config import TrainConfig
from trainer.data import Example, Sample, Text, file_digest, prompt_token_ids, tokenize
from trainer.lines import Mistake, parse_file, refusal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_SCHEME = "hf://"
# As huggingface_hub's file system writes it; a revision's own slashes are written %2F.
_HUB_FILE = re.compile(
    r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/@]+))?/(?P<path>.+\.jsonl?)"
)
_MAX_SHOWN_PAIRS = 3


class LinePair(NamedTuple):
    """A line, and an earlier one or one of data.train that has the same tokens."""

    line: int
    same_as: int


class _Tokenised(NamedTuple):
    """A file's examples and samples by line number, its digest, and how many were left out."""

    lines: dict[int, tuple[Example, Sample]]
    sha256: str
    num_too_long: int = 0


@dataclass(frozen=True)
class Truncation:
    """Samples of at most so many tokens, and what became of longer ones.

    Args:
        samples: each with a token that carries loss.
        num_truncated: those of `samples` that were longer.
        num_cut_tokens: tokens that were cut from these.
        num_left_out: samples of which no token with loss would be left.
    """

    samples: tuple[Sample, ...]
    num_truncated: int
    num_cut_tokens: int
    num_left_out: int


@dataclass(frozen=True)
class TrainingData:
    """Tokenised training samples, held-out sets, and what was done to them.

    Args:
        samples: at least one, each with a token that carries loss.
        num_truncated: samples that were longer than `max_tokens`.
        num_cut_tokens: tokens that were cut from these.
        num_left_out: samples of which no token with loss would be left.
        duplicates: lines of data.train with the tokens of an earlier one; they are trained on.
        eval_sets: held-out examples by the set's name, possibly none.
        eval_samples: their tokens.
        leaks: for each held-out set, its lines that are in data.train too.
        num_too_long: for each held-out set, lines above `max_tokens`, which are left out.
        data_sha256: hexadecimal digest of the file of data.train.
        max_tokens: the least of train.max_sample_tokens and what the model takes.
    """

    samples: tuple[Sample, ...]
    num_truncated: int
    num_cut_tokens: int
    num_left_out: int
    duplicates: tuple[LinePair, ...]
    eval_sets: dict[str, tuple[Example, ...]]
    eval_samples: dict[str, tuple[Sample, ...]]
    leaks: dict[str, tuple[LinePair, ...]]
    num_too_long: dict[str, int]
    data_sha256: str
    max_tokens: int

    @property
    def num_duplicates(self) -> int:
        """Lines of data.train that repeat an earlier one."""
        return len(self.duplicates)

    def remarks(self) -> list[str]:
        """Return a sentence for each thing that whoever starts a run should know of its data."""
        told = []
        if self.num_truncated:
            told.append(
                f"{self.num_truncated} samples truncated to {self.max_tokens} tokens, "
                f"{self.num_cut_tokens} tokens cut away"
            )
        if self.num_left_out:
            told.append(
                f"{self.num_left_out} samples left out: their tokens with loss lie beyond "
                f"the first {self.max_tokens}"
            )
        if self.duplicates:
            pairs = in_words(self.duplicates, "line {} repeats line {}")
            told.append(f"{self.num_duplicates} duplicates in data.train: {pairs}")
        for name, count in self.num_too_long.items():
            if count:
                told.append(
                    f"{count} samples of set {name} left out: longer than {self.max_tokens} tokens"
                )
        for name, pairs_of_set in self.leaks.items():
            if pairs_of_set:
                pairs = in_words(pairs_of_set, "line {} is line {} there")
                told.append(
                    f"leak: {len(pairs_of_set)} of {len(self.eval_sets[name])} held-out lines of "
                    f"set {name} are in data.train too: {pairs}"
                )
        return told


def load_data(
    config: TrainConfig, tokenizer: "PreTrainedTokenizerBase", *, max_positions: int | None
) -> TrainingData:
    """Read and tokenise the data that a run needs, held-out sets included.

    Args: max_positions: the most tokens that the model takes, if it says so.

    Raises: DataError: the mistakes of all files: wrong lines, examples that the tokenizer's chat
        template refuses, no usable sample, a file that can not be had.
    """
    problems: list[str] = []
    max_tokens = min(config.train.max_sample_tokens, max_positions or sys.maxsize)
    train, sets = None, {}
    try:
        train = _read(config.data.train, tokenizer, limit=None)
    except DataError as error:
        problems.append(str(error))
    for name, source in config.data.eval_sets.items():
        try:
            found = _read(source, tokenizer, limit=config.data.eval_limit)
            sets[name] = _answerable(source, found, tokenizer, max_tokens=max_tokens)
        except DataError as error:
            problems.append(str(error))
    cut = truncate([sample for _, sample in train.lines.values()] if train else [], max_tokens)
    if train and not cut.samples:
        problems.append(
            f"{config.data.train}: the tokens with loss of all {len(train.lines)} samples lie "
            f"beyond the first {max_tokens}; raise train.max_sample_tokens, up to what the model "
            "takes"
        )
    if train is None or problems:
        raise DataError("; ".join(problems))
    first_lines, duplicates = _first_lines(train)
    return TrainingData(
        samples=cut.samples,
        num_truncated=cut.num_truncated,
        num_cut_tokens=cut.num_cut_tokens,
        num_left_out=cut.num_left_out,
        duplicates=duplicates,
        eval_sets={
            name: tuple(example for example, _ in found.lines.values())
            for name, found in sets.items()
        },
        eval_samples={
            name: tuple(sample for _, sample in found.lines.values())
            for name, found in sets.items()
        },
        leaks={name: _leaks(found, first_lines) for name, found in sets.items()},
        num_too_long={name: found.num_too_long for name, found in sets.items()},
        data_sha256=train.sha256,
        max_tokens=max_tokens,
    )


def read_eval_set(
    source: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    limit: int | None,
    max_positions: int | None,
) -> tuple[tuple[Example, ...], int]:
    """Return the examples of a held-out file, and how many are longer than the model takes.

    Raises: DataError: as `load_data`.
    """
    found = _answerable(
        source,
        _read(source, tokenizer, limit=limit),
        tokenizer,
        max_tokens=max_positions or sys.maxsize,
    )
    return tuple(example for example, _ in found.lines.values()), found.num_too_long


def truncate(samples: Sequence[Sample], max_tokens: int) -> Truncation:
    """Cut samples at the end to `max_tokens`; leave out what then carries no loss."""
    kept: list[Sample] = []
    num_truncated, num_cut_tokens = 0, 0
    for sample in samples:
        if len(sample) <= max_tokens:
            kept.append(sample)
        elif any(sample.has_loss[:max_tokens]):
            kept.append(Sample(sample.token_ids[:max_tokens], sample.has_loss[:max_tokens]))
            num_truncated += 1
            num_cut_tokens += len(sample) - max_tokens
    return Truncation(tuple(kept), num_truncated, num_cut_tokens, len(samples) - len(kept))


def local_file(source: str) -> Path:
    """Return the file that a path or an address of the Hugging Face hub names, downloaded if new.

    Raises: DataError: an address of another form, or the hub does not give the file.
    """
    if not source.startswith(_HUB_SCHEME):
        return Path(source)
    match = _HUB_FILE.fullmatch(source)
    if match is None:
        raise DataError(
            f"{source}: not an address of a JSON-lines file on the hub, "
            "hf://datasets/OWNER/NAME[@REVISION]/PATH.jsonl is expected"
        )
    from huggingface_hub import hf_hub_download  # noqa: PLC0415  (heavy)

    revision = match["revision"]
    try:
        path = hf_hub_download(
            match["repository"],
            match["path"],
            repo_type="dataset",
            revision=unquote(revision) if revision else None,
        )
    except Exception as error:  # its errors have no common base: network, rights, names, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{source}: the Hugging Face hub did not give it ({reason}); check the address, or "
            "download it and name the file"
        ) from error
    return Path(path)


def _read(source: str, tokenizer: "PreTrainedTokenizerBase", *, limit: int | None) -> _Tokenised:
    path = local_file(source)
    examples, mistakes = parse_file(path, limit=limit)
    lines: dict[int, tuple[Example, Sample]] = {}
    for number, example in examples.items():
        try:
            lines[number] = (example, tokenize(example, tokenizer))
        except DataError as error:
            mistakes.append(Mistake(number, str(error)))
    if mistakes:
        raise refusal(source, sorted(mistakes, key=lambda mistake: mistake.line))
    return _Tokenised(lines, file_digest(path))


def _answerable(
    source: str, found: _Tokenised, tokenizer: "PreTrainedTokenizerBase", *, max_tokens: int
) -> _Tokenised:
    """Return a held-out set without samples that are too long: a part of one measures nothing.

    Raises: DataError: none is left, or a line asks nothing that could be answered.
    """
    kept = {n: (e, s) for n, (e, s) in found.lines.items() if len(s) <= max_tokens}
    if not kept:
        raise DataError(
            f"{source}: all {len(found.lines)} samples are longer than {max_tokens} tokens; raise "
            "train.max_sample_tokens, up to what the model takes"
        )
    mistakes = [
        Mistake(number, "the prompt is empty, words are expected where an answer is generated")
        for number, (example, _) in kept.items()
        if not isinstance(example, Text)
        and not example.choices
        and not prompt_token_ids(example, tokenizer)
    ]
    if mistakes:
        raise refusal(source, mistakes)
    return found._replace(lines=kept, num_too_long=len(found.lines) - len(kept))


def _first_lines(train: _Tokenised) -> tuple[dict[tuple[int, ...], int], tuple[LinePair, ...]]:
    """Return the first line of every row of tokens, and the lines that repeat one."""
    first_lines: dict[tuple[int, ...], int] = {}
    repeats = []
    for number, (_, sample) in train.lines.items():
        first = first_lines.setdefault(sample.token_ids, number)
        if first != number:
            repeats.append(LinePair(number, first))
    return first_lines, tuple(repeats)


def _leaks(
    held_out: _Tokenised, first_lines: Mapping[tuple[int, ...], int]
) -> tuple[LinePair, ...]:
    return tuple(
        LinePair(number, first_lines[sample.token_ids])
        for number, (_, sample) in held_out.lines.items()
        if sample.token_ids in first_lines
    )


def in_words(pairs: Sequence[LinePair], words: str) -> str:
    """Return the first pairs in words with two gaps, and how many more there are."""
    shown = ", ".join(words.format(*pair) for pair in pairs[:_MAX_SHOWN_PAIRS])
    more = len(pairs) - _MAX_SHOWN_PAIRS
    return f"{shown}{f', and {more} more' if more > 0 else ''}"
