"""TrainConfig: every setting of a training run, from one TOML file and flags of the same names."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from adapters.config import ALL_LINEAR

DEFAULT_EVAL_SET = "default"
_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

# A text, since pathlib would join the slashes of hf://.
DataSource = Annotated[
    str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("true and false stand for no number or name")
        return value


class DataSettings(_Section):
    """Where the data lies."""

    train: DataSource = Field(
        description="JSON-lines file to train on, or hf://datasets/OWNER/NAME[@REVISION]/PATH.jsonl"
    )
    eval: DataSource | dict[str, DataSource] | None = Field(
        None, description="held-out file as data.train, or a table of them; flag: PATH or SET=PATH"
    )
    eval_limit: int = Field(
        200, ge=1, description="lines of each file of data.eval that are used, the first ones"
    )

    @field_validator("eval", mode="before")
    @classmethod
    def _one_file_or_several_sets(cls, value: object) -> object:
        files = value.values() if isinstance(value, dict) else [value]
        if value is None or all(isinstance(file, str | Path) for file in files):
            return value
        raise ValueError(
            "a file, or a table of files by name is expected; as flags one PATH, or SET=PATH for "
            "each set"
        )

    @field_validator("eval")
    @classmethod
    def _sets_have_plain_names(cls, value: object) -> object:
        for name in value if isinstance(value, dict) else ():
            if not _SET_NAME.fullmatch(name):
                raise ValueError(f"the set's name {name!r} is none of letters, digits, _, . and -")
        return value

    @property
    def eval_sets(self) -> dict[str, str]:
        """Where each held-out set lies, by name; a single one is called "default"."""
        if isinstance(self.eval, dict):
            return self.eval
        return {} if self.eval is None else {DEFAULT_EVAL_SET: self.eval}


class AdapterSettings(_Section):
    """The adapter's shape."""

    method: Literal["lora", "rora"] = Field(
        "rora", description="lora scales by alpha/rank, rora by alpha/sqrt(rank)"
    )
    rank: int = Field(8, ge=1, description="rank of every adapted module")
    alpha: float = Field(16.0, gt=0, description="numerator of the scaling")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before A, in training only")
    target_modules: tuple[str, ...] = Field(
        (ALL_LINEAR,),
        min_length=1,
        description="all-linear (all but the output layer), names or suffixes of modules, or "
        "regular expressions that match whole module paths",
    )

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value


class AllocationSettings(_Section):
    """ALoRA: ranks move between modules while the adapter trains (arXiv 2403.16187)."""

    enabled: bool = Field(
        default=False,
        description="move ranks from modules where they matter least to others, while training",
    )
    warmup_epochs: float = Field(
        1.0, gt=0, description="passes over data.train before the first round (K1)"
    )
    rounds: int = Field(8, ge=1, description="times that ranks move (N_A)")
    epochs_per_round: float = Field(
        0.25, gt=0, description="passes over data.train after each round (K2)"
    )
    ranks_per_round: int | float = Field(
        7, description="ranks that move in a round: a number, or a fraction of all ranks (n_A)"
    )
    score_samples: int = Field(
        32,
        ge=1,
        description="samples of data.train that are set apart, to measure ranks on (B_val)",
    )
    score: Literal["gradient", "screened", "exact", "random", "off"] = Field(
        "gradient",
        description="how ranks are measured: by gradients; by these and ablation near the cut; by "
        "ablation; or controls: at random; not at all, and the time goes into more steps",
    )
    scale_rank: Literal["current", "initial"] = Field(
        "current", description="the rank in the scaling: a module's own, or the one it began with"
    )
    min_rank: int = Field(0, ge=0, description="rank that no module is pruned below")
    grace_rounds: int = Field(0, ge=0, description="rounds for which a new rank is not pruned")

    @field_validator("ranks_per_round", mode="before")
    @classmethod
    def _a_count_or_a_share(cls, value: object) -> float:
        number: object = value
        if isinstance(value, str):  # of a flag
            with suppress(ValueError):
                number = int(value) if value.isdecimal() else float(value)
        if isinstance(number, int) and not isinstance(number, bool) and number >= 1:
            return number
        if isinstance(number, float) and 0 < number < 1:
            return number
        raise ValueError("a whole number from 1, or a fraction between 0 and 1 is expected")

    @property
    def epochs(self) -> float:
        """Passes over the data that the rounds need."""
        return self.warmup_epochs + self.rounds * self.epochs_per_round


class LoopSettings(_Section):
    """The training loop."""

    epochs: float = Field(1.0, gt=0, le=10_000, description="passes over data.train")
    batch_tokens: int = Field(
        1024, ge=1, description="tokens of one step, over all processes; padding included, if any"
    )
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one forward and backward pass; a step of more adds up the gradients "
        "of several. Less memory, the same result (but dropout and noise are drawn for each)",
    )
    packing: bool = Field(
        default=True,
        description="put samples into one row without padding, their common prefix once; where a "
        "model can not do that exactly, they are padded and the reason is said",
    )
    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="highest learning rate; auto: by rank and scaling, docs/training.md"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="course of the learning rate after warm-up"
    )
    warmup_ratio: float = Field(0.06, ge=0, lt=1, description="share of steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="norm that gradients are clipped to")
    max_sample_tokens: int = Field(
        2048, ge=2, description="longer samples are truncated at the end, and counted"
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="compute each layer twice instead of keeping its values: less memory",
    )
    neftune_alpha: float = Field(
        0.0, ge=0, description="strength of NEFTune's noise on embeddings; 0: none"
    )
    eval_steps: int | None = Field(
        None,
        ge=1,
        description="measure the loss on data.eval every so many steps, and keep the weights of "
        "the best one; none: once, at the end",
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after so many of these measurements without a better one"
    )
    checkpoint_steps: int = Field(
        100, ge=1, description="write a checkpoint, to resume from, every so many steps"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of initial weights and data order")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of the base model; auto: bfloat16 where GPU or processor multiply in it, "
        "else float32",
    )
    load_in_4bit: bool = Field(
        default=False,
        description="keep the base model in 4 bits (NF4, by bitsandbytes): less memory",
    )

    @field_validator("learning_rate", mode="wrap")
    @classmethod
    def _a_number_or_auto(cls, value: object, read: ValidatorFunctionWrapHandler) -> object:
        try:
            return read(value)
        except ValidationError:
            raise ValueError('a number above 0 or "auto" is expected') from None


class TrackingSettings(_Section):
    """Where metrics go besides log.jsonl."""

    tensorboard: bool = Field(
        default=False, description="also write TensorBoard's event files, to OUTPUT/tensorboard"
    )
    wandb_project: str | None = Field(
        None, min_length=1, description="also send metrics to this project of Weights & Biases"
    )


class TrainConfig(_Section):
    """All settings of one run."""

    model: str | None = Field(
        None, description="folder or hub name of the base model; none: SmolLM2-135M-Instruct"
    )
    output: Path = Field(description="new folder for the adapter and the run's log")
    data: DataSettings
    adapter: AdapterSettings = AdapterSettings()
    allocation: AllocationSettings = AllocationSettings()
    train: LoopSettings = LoopSettings()
    tracking: TrackingSettings = TrackingSettings()

    @model_validator(mode="after")
    def _evaluations_have_data(self) -> Self:
        if self.train.early_stopping_patience is not None and self.train.eval_steps is None:
            raise ValueError("train.early_stopping_patience needs train.eval_steps")
        if self.train.eval_steps is not None and self.data.eval is None:
            raise ValueError("train.eval_steps needs data.eval")
        return self

    @model_validator(mode="after")
    def _rounds_fit(self) -> Self:
        settings = self.allocation
        if not settings.enabled:
            return self
        if self.train.epochs < settings.epochs - 1e-9:
            raise ValueError(
                f"train.epochs is {self.train.epochs:g}, at least allocation.warmup_epochs + "
                f"rounds * epochs_per_round = {settings.epochs:g} is expected; raise it, or lower "
                "those"
            )
        if settings.min_rank >= self.adapter.rank:
            raise ValueError(
                f"allocation.min_rank is {settings.min_rank}, below adapter.rank = "
                f"{self.adapter.rank} is expected, or no rank can move"
            )
        return self
