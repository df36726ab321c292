"""One duel of bench_training, in a process of its own: PEFT with transformers' Trainer, and ours.

    python -m benchmarks.training_duel MODE TASK [--dtype bfloat16]

Modes: `same` and `best` take a step of ours after each of the Trainer's, in the same process, so
that whatever else the machine does meets both. `peft-alone` and `ours-alone` take the steps of
`best` with one side only, to see its memory. `dora` and `adalora` are `same` with PEFT's other
methods. Prints one JSON object.
"""

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from adapters import AdapterConfig
from adapters.base_model import cache_folder, find_model
from trainer.batching import pad
from trainer.checkpoint import TrainingState
from trainer.config import DataSettings, LoopSettings, TrainConfig
from trainer.data import Sample, tokenize
from trainer.distributed import Processes
from trainer.inject import inject, target_modules
from trainer.lines import read_examples
from trainer.loop import Run, take_step
from trainer.lora_linear import LoraLinear
from trainer.model import BaseModel, load_base, load_tokenizer
from trainer.optim import RankAdamW
from trainer.trial import find_model_loss

FOLDERS = (Path("examples"), Path("benchmarks/data"))
SAMPLES_A_STEP = 16
RANK, ALPHA, LEARNING_RATE = 8, 16, 2e-4
NUM_WARM_UP = 2  # steps that are not timed
PAD_TOKEN_ID = 2
Dtype = Literal["float32", "bfloat16"]
MODES = ("same", "best", "peft-alone", "ours-alone", "dora", "adalora")
PEFT: dict[str, Any] = {
    "r": RANK,
    "lora_alpha": ALPHA,
    "use_rslora": True,
    "task_type": "CAUSAL_LM",
}


class Dataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples as the Trainer takes them, each with its index, so that ours can take the same."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, "input_ids": list(self.samples[index].token_ids)}


class Collator:
    """Pads a batch to its longest sample, and remembers which samples it holds."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.batches: deque[list[int]] = deque()
        self.taken: list[list[int]] = []

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return token ids, mask and labels, [samples, longest] each."""
        indices = [row["index"] for row in rows]
        self.batches.append(indices)
        self.taken.append(indices)
        samples = [self.samples[index] for index in indices]
        batch = pad(samples, pad_token_id=PAD_TOKEN_ID, device=torch.device("cpu"))
        labels = torch.full_like(batch.token_ids, -100).flatten()
        labels[batch.loss_places + 1] = batch.targets
        columns = torch.arange(batch.token_ids.shape[1])
        return {
            "input_ids": batch.token_ids,
            "attention_mask": (columns < batch.sample_lengths).long(),
            "labels": labels.view_as(batch.token_ids),
        }


class Duel(TrainerCallback):
    """Times each of the Trainer's steps, and then one of ours."""

    def __init__(self, ours: Callable[[], float] | None, allocate: Any) -> None:
        self.ours = ours
        self.allocate = allocate
        self.their_seconds: list[float] = []
        self.our_seconds: list[float] = []
        self.our_losses: list[float] = []
        self.started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the Trainer's clock."""
        self.started = time.perf_counter()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Let AdaLoRA move its ranks."""
        if self.allocate is not None:  # what AdaLoRA asks of a training loop
            self.allocate(state.global_step + 1)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop the Trainer's clock and take a step of ours."""
        self.their_seconds.append(time.perf_counter() - self.started)
        if self.ours is None:
            return
        # The Trainer's side runs as it does by default, ours as rora-train runs.
        torch.use_deterministic_algorithms(mode=True)
        started = time.perf_counter()
        loss = self.ours()
        self.our_seconds.append(time.perf_counter() - started)
        self.our_losses.append(loss)
        torch.use_deterministic_algorithms(mode=False)


def read_task(task: str, tokenizer: Any, limit: int | None) -> list[Sample]:
    """Return the first samples of a task's training data."""
    path = next(folder / task / "train.jsonl" for folder in FOLDERS if (folder / task).exists())
    examples = read_examples(path, limit=limit).values()
    return [tokenize(example, tokenizer) for example in examples]


def our_run(base: BaseModel, samples: Sequence[Sample], *, packing: bool, rank: int = RANK) -> Run:
    """Return a run of ours with fresh layers, as rora-train makes it."""
    loss, reason = find_model_loss(base, longest=max(map(len, samples)), packing=packing)
    assert reason is None
    names = target_modules(base.model, ("all-linear",))
    config = AdapterConfig(rank, ALPHA, use_rslora=True, target_modules=tuple(names))
    layers = inject(
        base.model, names, config, dropout=0.0, generator=torch.Generator().manual_seed(0)
    )
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    base.model.train()
    return Run(
        config=TrainConfig(
            output=Path("unused"),
            data=DataSettings(train="unused"),
            train=LoopSettings(batch_tokens=10**9),
        ),
        folder=Path("unused"),
        loss=loss,
        samples=samples,
        eval_samples={},
        optimizer=RankAdamW(layers, weight_decay=0.0),
        state=TrainingState(origin={}),
        processes=Processes(),
        log=None,
    )


def begin_alike(layers: Mapping[str, LoraLinear], peft_model: Any) -> None:
    """Give our layers the A that PEFT's begin with."""
    for name, layer in layers.items():
        theirs = peft_model.base_model.model.get_submodule(name).lora_A["default"].weight
        layer.lora_a.data.copy_(theirs.detach().float())


def peft_trainer(
    folder: Path,
    samples: Sequence[Sample],
    collator: Collator,
    *,
    mode: str,
    num_steps: int,
    dtype: Dtype,
) -> Trainer:
    """Return PEFT's side: a LoRA of all linear layers in transformers' Trainer."""
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    configs: dict[str, Callable[[], PeftConfig]] = {
        "dora": lambda: LoraConfig(**PEFT, target_modules="all-linear", use_dora=True),
        "adalora": lambda: AdaLoraConfig(
            init_r=RANK + RANK // 2, target_r=RANK, tinit=1, tfinal=1, total_step=num_steps,
            lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM",
        ),
    }  # fmt: skip
    config = configs.get(mode, lambda: LoraConfig(**PEFT, target_modules="all-linear"))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=SAMPLES_A_STEP,
        max_steps=num_steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        train_sampling_strategy="group_by_length" if mode in {"best", "peft-alone"} else "random",
        bf16=dtype == "bfloat16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return Trainer(
        model=get_peft_model(model, config()),
        args=arguments,
        train_dataset=Dataset(samples),
        data_collator=collator,
    )


def duel(mode: str, task: str, *, num_steps: int, dtype: Dtype) -> dict[str, Any]:
    """Run one duel and return what was seen."""
    folder = find_model(None, cache=cache_folder(os.environ))
    # Of everything there is, as a user's Trainer groups it by length.
    samples = read_task(task, load_tokenizer(folder), limit=None)
    if mode == "peft-alone":
        collator = Collator(samples)
        trainer = peft_trainer(
            folder, samples, collator, mode=mode, num_steps=num_steps, dtype=dtype
        )
        trainer.train()
        return {"peak_rss_mb": peak_rss_mb()}
    base = load_base("smollm2", folder, dtype=dtype)
    packing = mode in {"best", "ours-alone"}
    order = list(range(len(samples)))
    random.Random(0).shuffle(order)  # noqa: S311  (an order, not a secret)
    if mode == "ours-alone":
        run = our_run(base, samples, packing=packing)
        for step in range(num_steps):
            take_step(run, order[step * SAMPLES_A_STEP :][:SAMPLES_A_STEP], LEARNING_RATE)
        return {"peak_rss_mb": peak_rss_mb()}
    collator = Collator(samples)
    trainer = peft_trainer(folder, samples, collator, mode=mode, num_steps=num_steps, dtype=dtype)
    run = our_run(base, samples, packing=packing)
    if mode != "adalora":
        begin_alike(run.optimizer.layers, trainer.model)
    taken: list[list[int]] = []

    def our_step() -> float:
        indices = collator.batches.popleft()
        if mode == "best":
            indices = order[len(taken) * SAMPLES_A_STEP :][:SAMPLES_A_STEP]
        taken.append(indices)
        return take_step(run, indices, LEARNING_RATE)[0]

    peft_model: Any = trainer.model
    allocate = peft_model.update_and_allocate if mode == "adalora" else None
    callback = Duel(our_step, allocate)
    trainer.add_callback(callback)
    trainer.train()
    their_losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    gaps = [abs(a - b) for a, b in zip(callback.our_losses, their_losses, strict=True)]
    ours = tokens_per_second(run, taken, callback.our_seconds)
    theirs = tokens_per_second(run, collator.taken, callback.their_seconds)
    return {
        "ratio": ours / theirs,
        "our_tokens_per_s": ours,
        "their_tokens_per_s": theirs,
        "loss_gap": max(gaps),
        "flops_vs_limit": flops_vs_limit(run, taken, callback.our_seconds),
    }


def tokens_per_second(run: Run, taken: Sequence[Sequence[int]], seconds: Sequence[float]) -> float:
    """Return tokens of samples, padding aside, over the steps after the first ones."""
    steps = list(zip(taken, seconds, strict=False))[NUM_WARM_UP:]
    num_tokens = sum(run.lengths[index] for indices, _ in steps for index in indices)
    return num_tokens / sum(step_seconds for _, step_seconds in steps)


def flops_vs_limit(run: Run, taken: Sequence[Sequence[int]], seconds: Sequence[float]) -> float:
    """Return our steps' products per second over those of the fastest product seen here."""
    shares = []
    limit = products_per_second(run.loss.base.model.dtype)
    for indices, step_seconds in list(zip(taken, seconds, strict=True))[-3:]:
        with FlopCounterMode(display=False) as counter:
            take_step(run, indices, 0.0)
        shares.append(counter.get_total_flops() / step_seconds / limit)
    return float(statistics.median(shares))


def products_per_second(dtype: torch.dtype) -> float:
    """Return 2 * multiply-adds a second of one large product of the model's own sizes."""
    x, weight = torch.randn(1024, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    best = math.inf
    for _ in range(20):
        started = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return 2 * 1024 * 576 * 1536 / best


def peak_rss_mb() -> float:
    """Return the most memory that this process held; not ru_maxrss, which counts its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    """Run one duel and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("task")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    seen = duel(arguments.mode, arguments.task, num_steps=arguments.steps, dtype=arguments.dtype)
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
