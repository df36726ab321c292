"""Loading a base model and its tokenizer for training and evaluation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from adapters.errors import BaseModelError


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
        """Id that fills batches; its value never matters, it is masked."""
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
    name: str, folder: Path, *, dtype: Literal["auto", "float32", "bfloat16", "float16"]
) -> BaseModel:
    """Load a decoder model onto the GPU if there is one, else the CPU; `dtype` as in LoopSettings.

    Raises: BaseModelError: transformers can not load it as a decoder model.
    """
    tokenizer = load_tokenizer(folder)
    on_gpu = torch.cuda.is_available()
    if dtype == "auto":
        dtype = "bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseModelError(
            f"{folder}: no decoder model that transformers can load ({_first_line(error)})"
        ) from error
    model.eval()
    # transformers wraps nn.Module.to in a decorator that hides its types.
    placed: PreTrainedModel = nn.Module.to(model, "cuda" if on_gpu else "cpu")
    return BaseModel(name, folder, placed, tokenizer)


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
