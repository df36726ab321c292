"""What vLLM's own server is told: our options, and those that users give after `--`."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from adapters import AdapterStore
from adapters.errors import ConfigError
from adapters.limits import MAX_LORA_RANK
from adapters.receipt import read_base_shapes
from rora_serve.config import ServeConfig
from rora_serve.memory import cpu_dtype, free_memory
from rora_serve.tool_parsers import tool_parser_of

# vLLM's options, by their names in its parser, that decide how adapters are served or would let a
# request past the front door: ours to set, in whatever spelling they are given.
_OWN_OPTIONS = (
    "api_key", "api_server_count", "config", "default_mm_loras", "enable_lora", "enforce_eager",
    "fully_sharded_loras", "headless", "host", "lora_dtype", "lora_modules", "lora_target_modules",
    "max_cpu_loras", "max_lora_rank", "max_loras", "max_num_seqs", "middleware", "model",
    "model_tag", "port", "uds", "worker_cls",
)  # fmt: skip
# vLLM counts adapters on the host and would evict by number; nothing is evicted by number here.
_MAX_CPU_LORAS = 1_000_000
# Ours by default, a user's to change.
_TOOL_PARSER = "--tool-call-parser"
_FREE_OPTIONS = frozenset(
    {"--dtype", "--kv-cache-memory-bytes", "--max-model-len", "--served-model-name"}
)
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_GPU_FACTOR_BYTES = 2  # of one number in vLLM's slots, in the dtypes that GPUs serve in
_MAX_KV_CACHE_BYTES = 2 * 1024**3
# Of vLLM's slots on GPUs at least, so that what is uploaded later finds some.
_LEAST_GPU_RANK = 16


def engine_options(config: ServeConfig, model: Path, base_name: str, given: list[str]) -> list[str]:
    """Return vLLM's options for this server; those in `given` that users may set are left out."""
    flags = ["--enable-lora"]
    options = {
        "--model": str(model),
        "--host": config.host,
        "--port": str(config.port),
        "--max-num-seqs": str(config.max_num_seqs),
        "--max-cpu-loras": str(_MAX_CPU_LORAS),
        "--served-model-name": base_name,
    }
    if is_cpu_build():
        if not config.compile:
            flags.append("--enforce-eager")
        # One slot for every request of a step: no adapter can be skipped or starve. Neither a slot
        # nor a rank that nothing uses costs anything in our layers.
        options["--max-loras"] = str(config.max_num_seqs)
        options["--max-lora-rank"] = str(MAX_LORA_RANK)
        options["--dtype"] = cpu_dtype()
        free = free_memory(model, dtype=_dtype_of(given))
        options["--kv-cache-memory-bytes"] = str(min(free // 4, _MAX_KV_CACHE_BYTES))
        # What a model can read at most may not fit there, and vLLM would not start.
        options["--max-model-len"] = "auto"
    else:
        padded = padded_slots(config, AdapterStore(config.store))
        print(f"rora-serve: {padded.in_words(model)}", file=sys.stderr)
        options["--max-loras"] = str(padded.num_slots)
        options["--max-lora-rank"] = str(padded.rank)
    names = {option.partition("=")[0].replace("_", "-") for option in given}
    parser = tool_parser_of(model)
    # Whoever gives another chat template knows what the model is to write.
    if parser is not None and not names & {_TOOL_PARSER, "--chat-template"}:
        flags.append("--enable-auto-tool-choice")
        options[_TOOL_PARSER] = parser
    listed = [
        part
        for name, value in options.items()
        if name not in names & _FREE_OPTIONS
        for part in (name, value)
    ]
    return [*flags, *listed]


def _dtype_of(given: list[str]) -> str | None:
    """Return the dtype that options for vLLM name, of which nothing else is looked at yet."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--dtype")
    try:
        dtype: str | None = parser.parse_known_args(given)[0].dtype
    except argparse.ArgumentError:  # vLLM's own parser will say what is wrong with it
        return None
    return dtype


@dataclass(frozen=True)
class PaddedSlots:
    """What vLLM's own layers, which serve on GPUs, have to be told: every slot has one rank.

    Args:
        num_slots: adapters in one step at most.
        rank: of every slot, one that vLLM takes.
        num_adapters, num_bytes: names in the store, and what their latest versions' tensors take.
    """

    num_slots: int
    rank: int
    num_adapters: int
    num_bytes: int

    def in_words(self, model: Path) -> str:
        """Say what padding costs. Cost: reads the headers of the base model."""
        linear = read_base_shapes(model, name=model.name).linear.values()
        features = sum(sum(shape) for shape in linear if shape is not None)
        padded = self.num_slots * self.rank * features * _GPU_FACTOR_BYTES
        return (
            f"{self.num_adapters} adapters take {self.num_bytes >> 20} MiB at their own ranks; "
            f"vLLM's layers pad {self.num_slots} slots to rank {self.rank}, {padded >> 20} MiB"
        )


def padded_slots(config: ServeConfig, store: AdapterStore) -> PaddedSlots:
    """Return slots and rank that serve every name of the store and what its aliases mean.

    Raises: ConfigError: an adapter of a higher rank than vLLM takes.
    """
    records = list(store.names())
    latest = [record.latest for record in records]
    meant = (record.version(digest) for record in records for digest in record.aliases.values())
    largest = max((version.max_rank for version in meant), default=1)
    if largest > MAX_LORA_RANK:
        raise ConfigError(
            f"{store.root}: an adapter has rank {largest}, {MAX_LORA_RANK} is served at most"
        )
    return PaddedSlots(
        num_slots=max(1, min(config.max_num_seqs, len(latest))),
        rank=next(rank for rank in _VLLM_RANKS if rank >= max(largest, _LEAST_GPU_RANK)),
        num_adapters=len(latest),
        num_bytes=sum(version.num_bytes for version in latest),
    )


def is_cpu_build() -> bool:
    """Tell whether vLLM was built for CPUs, where our own layers serve adapters."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    return bool(current_platform.is_cpu())


def parse_options(own: list[str], given: list[str]) -> argparse.Namespace:
    """Return vLLM's arguments from our options and those given after `--`.

    Raises: ConfigError: a given option changes one of ours, or vLLM refuses it.
    """
    from vllm.entrypoints.launchers.cli_args import (  # noqa: PLC0415
        make_arg_parser,
        validate_parsed_serve_args,
    )
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # noqa: PLC0415

    parser = make_arg_parser(FlexibleArgumentParser(prog="rora-serve [..] --"))

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"after `--`: {message}")

    # Python's own prints 300 lines of vLLM's usage first.
    parser.error = refuse  # type: ignore[method-assign]
    ours: argparse.Namespace = parser.parse_args(own)
    arguments: argparse.Namespace = parser.parse_args(own + given)
    for name in _OWN_OPTIONS:
        if getattr(arguments, name) != getattr(ours, name):
            raise ConfigError(
                f"--{name.replace('_', '-')}: set by rora-serve itself, not after `--`; "
                "see rora-serve --help"
            )
    if is_cpu_build():
        _check_served_on_cpus(arguments)
    if arguments.logprobs_mode.endswith("logits"):
        raise ConfigError(
            f"--logprobs-mode {arguments.logprobs_mode}: log-probs are expected, which probes of "
            "adapters are compared with; leave it out"
        )
    try:
        validate_parsed_serve_args(arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM's options: {error}") from error
    return arguments


def _check_served_on_cpus(arguments: argparse.Namespace) -> None:
    """Refuse what our layers do not serve.

    Raises: ConfigError: one of these options is given.
    """
    for option in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
        size = getattr(arguments, option)
        if size > 1:
            raise ConfigError(
                f"--{option.replace('_', '-')}: {size}, adapters are served by one worker on CPUs; "
                "leave it at 1"
            )
    if arguments.speculative_config is not None:
        raise ConfigError(
            "--speculative-config: guessing tokens ahead is not served beside adapters on CPUs "
            "yet; leave it out"
        )
    if arguments.kv_sharing_fast_prefill:
        raise ConfigError(
            "--kv-sharing-fast-prefill: layers that leave tokens out are not served beside "
            "adapters on CPUs yet; leave it out"
        )
