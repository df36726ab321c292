"""Every mistake in a run's settings and data at once, and one batch as the model will see it."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from adapters.base_model import model_name
from adapters.errors import ConfigError, RoraError
from trainer.allocation import Allocation, check_num_moved, set_apart
from trainer.config import TrainConfig
from trainer.data import Sample
from trainer.dataset import LinePair, TrainingData, in_words, load_data
from trainer.export import adapter_config
from trainer.inject import check_ranks, target_modules
from trainer.loop import plan_run, plan_with_rounds
from trainer.model import empty_model, load_tokenizer, max_positions
from trainer.run_folder import check_output

# Brackets that no data is likely to hold.
_LOSS_BEGINS, _LOSS_ENDS = "⟦", "⟧"
_BOLD, _NOT_BOLD = "\x1b[1m", "\x1b[22m"
_MAX_SHORTENED = 3  # samples of the batch that are shown beside the first
# Of each part of a shortened sample; its end is what comes before an answer.
_HEAD_CHARACTERS, _TAIL_CHARACTERS = 20, 80
_MAX_SHORT_PARTS = 6


def validate(config: TrainConfig, model_folder: Path, *, bold: bool = False) -> str:
    """Check settings, model and data of a run without loading weights.

    Args:
        config: of the run.
        model_folder: of the base model.
        bold: show what carries loss in bold too, for a terminal.
    Returns: a report with one batch, the parts that carry loss between ⟦ and ⟧.
    Raises: ConfigError: every mistake, joined by "; ".
    """
    problems: list[str] = []
    num_modules, allocation = 0, None
    try:
        check_output(config.output)
    except RoraError as error:
        problems.append(str(error))
    try:
        num_modules = _check_adapter(config, model_folder)
    except RoraError as error:
        problems.append(str(error))
    try:
        tokenizer = load_tokenizer(model_folder)
        data = load_data(config, tokenizer, max_positions=max_positions(empty_model(model_folder)))
        samples, score_samples = set_apart(config, data.samples)
        if config.allocation.enabled:
            _, allocation = plan_with_rounds(
                config,
                samples,
                score_samples,
                num_modules=num_modules,
                packed=config.train.packing,
            )
    except RoraError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    lengths = [len(sample) for sample in samples]
    one_epoch = config.train.model_copy(update={"epochs": 1.0})
    # Whether a model can be given packed samples is found out when a run starts.
    plan = plan_run(
        config.model_copy(update={"train": one_epoch}), lengths, packed=config.train.packing
    )
    batch = next(indices for _, indices in plan if 0 in indices)
    # The first sample is the one of the file's first lines, which its writer knows.
    shown = [samples[index] for index in sorted(batch)]
    return "\n".join(
        [
            *_facts(config, data, num_steps=len(plan), allocation=allocation),
            "",
            f"one batch of {len(batch)} samples, what carries loss between "
            f"{_LOSS_BEGINS} and {_LOSS_ENDS}:",
            "",
            *_batch_lines(shown, tokenizer, bold=bold),
        ]
    )


def show_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase, *, bold: bool = False) -> str:
    """Return a sample's text, the parts that carry loss between ⟦ and ⟧."""
    return "".join(_marked(text, loss, bold) for text, loss in _parts(sample, tokenizer))


def _facts(
    config: TrainConfig, data: TrainingData, *, num_steps: int, allocation: Allocation | None
) -> list[str]:
    lengths = sorted(map(len, data.samples))
    num_tokens = sum(lengths)
    num_loss = sum(len(sample.loss_places) for sample in data.samples)
    facts = [
        ("samples", f"{len(lengths)} of {config.data.train}"),
        ("tokens", f"{num_tokens}, {num_loss} of them carry loss ({num_loss / num_tokens:.1%})"),
        (
            "length",
            f"median {_quantile(lengths, 50)}, 95% {_quantile(lengths, 95)}, longest "
            f"{lengths[-1]} tokens",
        ),
        (
            "truncated",
            f"{data.num_truncated} samples to {data.max_tokens} tokens, "
            f"{data.num_cut_tokens} tokens cut away",
        ),
        ("left out", f"{data.num_left_out} samples, for no token with loss was left"),
        ("duplicates", _counted(data.duplicates, "line {} repeats line {}")),
        ("steps", f"{num_steps} an epoch, of at most {config.train.batch_tokens} tokens"),
    ]
    for name, examples in data.eval_sets.items():
        leaks = _counted(data.leaks[name], "line {} is line {} there")
        facts.append(
            (
                "held out",
                f"{name}: {len(examples)} samples, too long and left out "
                f"{data.num_too_long[name]}, also in data.train {leaks}",
            )
        )
    if not data.eval_sets:
        facts.append(("held out", "none"))
    if allocation is not None:
        facts.append(("allocation", allocation.in_words()))
    width = max(len(name) for name, _ in facts)
    return [f"{name:{width}}  {fact}" for name, fact in facts]


def _counted(pairs: Sequence[LinePair], words: str) -> str:
    return f"{len(pairs)} ({in_words(pairs, words)})" if pairs else "0"


def _quantile(ordered: Sequence[int], percent: int) -> int:
    """Return the smallest value that at least so many percent do not exceed."""
    return ordered[-(-len(ordered) * percent // 100) - 1]


def _batch_lines(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, *, bold: bool
) -> list[str]:
    """Return the first sample in full, the next shortened to a line each."""
    lines = [show_sample(samples[0], tokenizer, bold=bold)]
    for sample in samples[1 : 1 + _MAX_SHORTENED]:
        parts = _parts(sample, tokenizer)
        line = "".join(_marked(_short(text), loss, bold) for text, loss in parts[:_MAX_SHORT_PARTS])
        lines += ["", f"{line} …" if len(parts) > _MAX_SHORT_PARTS else line]
    if len(samples) > 1 + _MAX_SHORTENED:
        lines += ["", f"and {len(samples) - 1 - _MAX_SHORTENED} more samples"]
    return lines


def _parts(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the text of each run of tokens that carry loss or do not, and which."""
    parts: list[tuple[str, bool]] = []
    start = 0
    for stop in range(1, len(sample) + 1):
        if stop == len(sample) or sample.has_loss[stop] != sample.has_loss[start]:
            text = str(tokenizer.decode(list(sample.token_ids[start:stop])))
            parts.append((_harmless(text), sample.has_loss[start]))
            start = stop
    return parts


def _marked(text: str, has_loss: bool, bold: bool) -> str:  # noqa: FBT001  (a sample's fact)
    marked = f"{_LOSS_BEGINS}{text}{_LOSS_ENDS}" if has_loss else text
    return f"{_BOLD}{marked}{_NOT_BOLD}" if has_loss and bold else marked


def _short(text: str) -> str:
    """Return a text on one line, its middle left out if it is long."""
    flat = text.replace("\n", "⏎")
    if len(flat) <= _HEAD_CHARACTERS + _TAIL_CHARACTERS:
        return flat
    return f"{flat[:_HEAD_CHARACTERS]}…{flat[-_TAIL_CHARACTERS:]}"


def _harmless(text: str) -> str:
    """Return data's text so that it can not steer a terminal."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text
    )


def _check_adapter(config: TrainConfig, model_folder: Path) -> int:
    """Check targets and ranks on a model without weights; return how many modules are adapted."""
    modules = target_modules(empty_model(model_folder), config.adapter.target_modules)
    check_ranks(modules, adapter_config(config, model_name(config.model), sorted(modules)))
    check_num_moved(config, len(modules))
    return len(modules)
