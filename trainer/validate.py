"""Every mistake in a run's settings and data at once, and one sample as the model will see it."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from adapters.base_model import model_name
from adapters.errors import ConfigError, RoraError
from trainer.batching import plan_epoch
from trainer.config import TrainConfig
from trainer.data import Sample
from trainer.export import adapter_config
from trainer.inject import check_ranks, target_modules
from trainer.loop import check_output, load_data
from trainer.model import empty_model, load_tokenizer

# Brackets that no data is likely to hold.
_LOSS_BEGINS, _LOSS_ENDS = "⟦", "⟧"


def validate(config: TrainConfig, model_folder: Path) -> str:
    """Check settings, model and data of a run without loading weights.

    Returns: a report with one sample, the part that carries loss between ⟦ and ⟧.
    Raises: ConfigError: every mistake, joined by "; ".
    """
    problems: list[str] = []
    checks: tuple[Callable[[], object], ...] = (
        lambda: check_output(config.output),
        lambda: _check_adapter(config, model_folder),
    )
    for check in checks:
        try:
            check()
        except RoraError as error:
            problems.append(str(error))
    try:
        tokenizer = load_tokenizer(model_folder)
        data = load_data(config, tokenizer)
    except RoraError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    plan = plan_epoch(
        [len(sample) for sample in data.samples],
        batch_tokens=config.train.batch_tokens,
        seed=config.train.seed,
    )
    num_loss = sum(sum(sample.has_loss) for sample in data.samples)
    num_tokens = sum(map(len, data.samples))
    return "\n".join(
        [
            f"{len(data.samples)} samples, {num_tokens} tokens, {num_loss} of them carry loss; "
            f"{data.num_too_long} samples are too long and left out",
            f"{len(plan)} steps an epoch of at most {config.train.batch_tokens} tokens",
            f"{len(data.eval_chats)} held-out chats",
            "",
            show_sample(data.samples[0], tokenizer),
        ]
    )


def show_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sample's text, the parts that carry loss between ⟦ and ⟧."""
    parts: list[str] = []
    start = 0
    for stop in range(1, len(sample) + 1):
        if stop == len(sample) or sample.has_loss[stop] != sample.has_loss[start]:
            text = str(tokenizer.decode(list(sample.token_ids[start:stop])))
            marked = f"{_LOSS_BEGINS}{text}{_LOSS_ENDS}" if sample.has_loss[start] else text
            parts.append(marked)
            start = stop
    return "".join(parts)


def _check_adapter(config: TrainConfig, model_folder: Path) -> None:
    """Check targets and ranks on a model without weights."""
    modules = target_modules(empty_model(model_folder), config.adapter.target_modules)
    check_ranks(modules, adapter_config(config, model_name(config.model), sorted(modules)))
