"""Loading a base model and its tokenizer for training and evaluation."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.errors import BaseModelError, ConfigError


@dataclass(frozen=True)
class BaseModel:
    """A base model ready to be adapted.

    Args:
        name: what adapters call it.
        folder: where its files lie.
    """

    name: str
    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def pad_token_id(self) -> int:
        """Id that fills batches on the right, where no token with loss can see it."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder.

    Raises: BaseModelError: it has none, or one without an end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{folder}: no tokenizer that transformers can load ({_first_line(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise BaseModelError(f"{folder}: the tokenizer has no end token, one is expected")
    return tokenizer


def load_base(
    name: str,
    folder: Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16", "float16"],
    load_in_4bit: bool = False,
) -> BaseModel:
    """Load a decoder model onto the GPU if there is one, else the CPU.

    Args: dtype, load_in_4bit: as in LoopSettings.

    Raises:
        BaseModelError: transformers can not load it as a decoder model.
        ConfigError: bitsandbytes, which keeps a model in 4 bits, is not installed.
    """
    tokenizer = load_tokenizer(folder)
    on_gpu = torch.cuda.is_available()
    torch_dtype = _fastest_dtype() if dtype == "auto" else getattr(torch, dtype)
    quantization = _four_bits(torch_dtype) if load_in_4bit else {}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype, **quantization)
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseModelError(
            f"{folder}: no decoder model that transformers can load ({_first_line(error)})"
        ) from error
    model.eval()
    if load_in_4bit:  # placed while it was loaded
        for module in model.modules():
            # On processors with AVX512-BF16 bitsandbytes (seen in 0.50) repacks a layer for
            # inference at its first forward outside training: no gradient goes through it then.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (typed by torch)
        return BaseModel(name, folder, model, tokenizer)
    # transformers wraps nn.Module.to in a decorator that hides its types.
    placed: PreTrainedModel = nn.Module.to(model, "cuda" if on_gpu else "cpu")
    return BaseModel(name, folder, placed, tokenizer)


def _fastest_dtype() -> torch.dtype:
    """Return bfloat16 where it is multiplied in hardware, else float32.

    With AVX512-BF16 a product takes a quarter of float32's time; a processor without such
    instructions takes longer in bfloat16 than in float32.
    """
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32


def _four_bits(dtype: torch.dtype) -> dict[str, Any]:
    """Return what makes transformers keep the linear layers in NF4 (QLoRA, arXiv 2305.14314)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "train.load_in_4bit: the package bitsandbytes is not installed; "
            "pip install bitsandbytes, or leave the key out"
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the model was made for, if it says so."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def empty_model(folder: Path) -> PreTrainedModel:
    """Return a decoder model of the folder's shapes without weights, to check settings against.

    Raises: BaseModelError: transformers can not make one.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder)
            )
    except (OSError, ValueError) as error:
        raise BaseModelError(
            f"{folder}: no decoder model that transformers can load ({_first_line(error)})"
        ) from error
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
