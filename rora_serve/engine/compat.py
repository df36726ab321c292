"""Every private or undocumented name of vLLM that we touch, with the versions they were tested on.

tests/rora_serve/test_compat.py fails when one of them moves.
"""

from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

import torch
import vllm
import zmq
from torch import Tensor, nn
from vllm.distributed.device_communicators.shm_broadcast import SpinCondition
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import supports_lora
from vllm.renderers import hf
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import utils as engine_utils
from vllm.v1.executor import multiproc_executor
from vllm.v1.sample import sampler
from vllm.v1.structured_output import backend_outlines

from adapters.artifact import Kind
from adapters.errors import EngineSeamError

TESTED_VERSIONS = ("0.32.",)

_MAX_WAKE_UPS = 1000  # that a process was not told of yet; it takes the last one for all


def check_vllm_version() -> None:
    """Refuse a vLLM whose private names were never looked at.

    Raises: EngineSeamError: another version than the tested ones.
    """
    if not vllm.__version__.startswith(TESTED_VERSIONS):
        raise EngineSeamError(
            f"vLLM {vllm.__version__}: a version {' or '.join(TESTED_VERSIONS)}x is expected; "
            "install the version that rora-serve pins"
        )


def sleep_between_messages() -> None:
    """Let this process wait for messages of vLLM's other processes asleep.

    By default a process that had one within a second looks for the next one again and again. Where
    every core computes, that takes a third of one from the threads that the message is made by.

    Who sleeps has to be woken for each message. vLLM's socket holds one wake-up, and zmq looks once
    a millisecond whether it was taken: of two messages within one the second woke nobody, and was
    found when the reader looked by itself, 5 s later. So the socket gets room for more.
    """
    condition_type: Any = SpinCondition
    make = condition_type.__init__
    make.__defaults__ = (0,)  # busy_loop_s, which nobody gives

    def make_with_room(condition: Any, **options: Any) -> None:
        make(condition, **options)
        if not condition.is_reader:
            socket, address = condition.local_notify_socket, options["notify_address"]
            socket.unbind(address)  # a limit holds for what is bound after it is set
            socket.setsockopt(zmq.SNDHWM, _MAX_WAKE_UPS)
            socket.bind(address)

    condition_type.__init__ = make_with_room


def fork_processes(context: BaseContext) -> None:
    """Let vLLM start its processes by `context`.

    It knows of fork servers, and its settings do not take one. What it asks for instead, new
    interpreters, is what it does with any context that is not named "fork".
    """
    for module in (engine_utils, multiproc_executor):
        starting: Any = module
        starting.get_mp_context = lambda: context


def replace_lora_manager(model_runner: Any, make_manager: Callable[[nn.Module], Any]) -> None:
    """Let a model runner use our LoRA manager in place of vLLM's.

    The runner calls `load_lora_model` once after it loaded the base model, and keeps what it
    returns as its model; from then on it talks to `lora_manager`. Like vLLM's own, ours takes only
    models that say they support LoRA: Bloom and Falcon lie in memory in another order of rows than
    in their files, and adapters would change the wrong ones.
    """

    def load_lora_model(model: nn.Module, *_: Any) -> nn.Module:
        if not supports_lora(model):
            raise EngineSeamError(
                f"{type(model).__name__}: vLLM does not support adapters of this model; a base "
                "model of another architecture is expected"
            )
        model_runner.lora_manager = make_manager(model)
        return model

    model_runner.load_lora_model = load_lora_model


def mix_experts_as_without_lora() -> None:
    """Let mixtures of experts be computed as they are in a server without LoRA.

    Where LoRA is on vLLM takes Triton's kernels for them, which CPUs do not have, and the first
    step ends the engine. Adapters of experts are refused before they are served.
    """
    from vllm.model_executor.layers.fused_moe import layer  # noqa: PLC0415  (for the worker alone)

    module: Any = layer
    config_type = module.FusedMoEConfig
    module.FusedMoEConfig = lambda **options: config_type(**options | {"is_lora_enabled": False})


_REHEARSED_TOKENS = 7  # of as many requests, or of fewer


def rehearse(model_runner: Any) -> None:
    """Run the base model on rows of one dummy adapter, as vLLM does to measure or to compile."""
    num_tokens = min(_REHEARSED_TOKENS, model_runner.max_num_tokens)
    model_runner._dummy_run(num_tokens, num_active_loras=1)


def rehearse_decoding(model_runner: Any) -> None:
    """Do the same as a step of decoding, and as one with prompts, of which layers are told.

    Each sequence may have a block of the KV cache; the first one is vLLM's.
    """
    num_blocks = model_runner.kv_cache_config.num_blocks - 1
    limits = (model_runner.max_num_reqs, model_runner.max_num_tokens, max(num_blocks, 1))
    num_seqs = min(_REHEARSED_TOKENS, *limits)
    model_runner._dummy_run(num_seqs, num_active_loras=1, uniform_decode=True, force_attention=True)
    num_tokens = min(_REHEARSED_TOKENS, model_runner.max_num_tokens)
    model_runner._dummy_run(
        num_tokens, num_active_loras=1, create_mixed_batch=True, force_attention=True
    )


def metadata_builders(model_runner: Any) -> list[Any]:
    """Return what tells the model's layers of attention about a step; one, if it tells all."""
    groups = [group for of_cache in model_runner.attn_groups for group in of_cache]
    return [group.get_metadata_builder() for group in groups]


_VLLMS_DISPATCH: Any = utils.dispatch_cpu_unquantized_gemm


def replace_products(make: Callable[[Tensor], Any]) -> None:
    """Let layers of the base model multiply by what `make` makes of their weights.

    vLLM asks one function for each layer's product, after the weights were read. Linear layers then
    go to it straight away; vLLM asks how to multiply at each call, 2 us a layer.
    Args: make: given a weight, returns a function of x, the weight (or None, as it may be gone) and
        the bias, with `pack` to copy the weight; or None, for vLLM's own product.
    """
    module: Any = utils

    def dispatch_or_replace(layer: Any, remove_weight: bool) -> None:  # noqa: FBT001  (vLLM's)
        product = None if layer.weight.is_meta else make(layer.weight)
        if product is None:
            _VLLMS_DISPATCH(layer, remove_weight)
            return
        layer.cpu_linear = product
        method: Any = getattr(layer, "quant_method", None)
        is_plain = type(method) is UnquantizedLinearMethod
        if is_plain:  # each layer has one of its own
            method.apply = lambda _, x, bias=None: product(x, None, bias)
        if remove_weight:
            product.pack()
            nothing = torch.empty(0, dtype=layer.weight.dtype)
            layer.weight = nn.Parameter(nothing, requires_grad=False)

    module.dispatch_cpu_unquantized_gemm = dispatch_or_replace


def pack_heads(model: nn.Module) -> None:
    """Let products of output heads copy their weights, which embeddings may share.

    Embeddings are multiplied by nobody, and keep the weight alone.
    """
    for _, _, head in _heads(model):
        pack = getattr(getattr(head, "cpu_linear", None), "pack", None)
        if pack is not None:
            pack()


def _heads(model: nn.Module) -> Iterator[tuple[str, LogitsProcessor, VocabParallelEmbedding]]:
    """Yield each output head's path, what applies it, and what holds its weight."""
    for name, module in model.named_modules():
        if isinstance(module, LogitsProcessor):
            parent, dot, _ = name.rpartition(".")
            head = getattr(model.get_submodule(parent), "lm_head", None)
            if isinstance(head, VocabParallelEmbedding):
                yield f"{parent}{dot}lm_head", module, head


def rank_tokens_uncompiled() -> None:
    """Let the sampler count the tokens above a sampled one without a compiled kernel.

    vLLM compiles this comparison when the first request asks for log-probs. That takes 2 to 20 s,
    in which no step is made, and where there is no C++ compiler it ends the engine. The rows of a
    step are few, so that the copy which the kernel saves is nothing.
    """

    def count(log_probs: Tensor, values: Tensor) -> Tensor:
        return (log_probs >= values).sum(-1)

    module: Any = sampler
    module.batched_count_greater_than = count


# Layers whose weight vLLM multiplies into another one, past their own forward (multi-head latent
# attention), so that nothing could be added to what they return.
_ABSORBED = frozenset({"kv_b_proj"})


@dataclass(frozen=True)
class BaseLayer:
    """A layer of the base model that adapters can change.

    Args:
        name: path in vLLM's model.
        module: what computes it; of the output head, the logits processor.
        kind: of layer.
        in_features: of a linear layer; of an embedding, its vocabulary.
        parts: per module path, its first output column and its number of output columns.
        product: of `replace_products`, where what it returns is the layer's output.
    """

    name: str
    module: nn.Module
    kind: Kind
    in_features: int
    parts: Mapping[str, tuple[int, int]]
    product: Any = None

    @property
    def is_head(self) -> bool:
        """Whether it is the output head, which gets the rows of logits, not those of tokens."""
        return isinstance(self.module, LogitsProcessor)


def base_layers(model: nn.Module) -> list[BaseLayer]:
    """Return every linear layer and embedding of a model, and its output head.

    The head of a model with tied weights is a layer of its own here, as it is to PEFT.
    """
    found = []
    # Of a model that sees images, the encoder's rows are not those of tokens.
    get_language_model: Any = getattr(model, "get_language_model", lambda: model)
    inside = {id(module) for module in get_language_model().modules()}
    for name, module in model.named_modules():
        if id(module) not in inside:
            continue
        if isinstance(module, LinearBase) and name.rpartition(".")[2] not in _ABSORBED:
            parts = linear_parts(name, module, model)
            product = whole_product(module)
            found.append(BaseLayer(name, module, "linear", module.input_size, parts, product))
        elif isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead):
            parts = {name: (0, module.embedding_dim)}
            found.append(BaseLayer(name, module, "embedding", module.org_vocab_size, parts))
    for path, processor, head in _heads(model):
        parts = {path: (0, head.org_vocab_size)}
        found.append(BaseLayer(path, processor, "linear", head.embedding_dim, parts))
    return found


_PLAIN_FORWARDS = {
    layer.forward for layer in (ReplicatedLinear, ColumnParallelLinear, RowParallelLinear)
}


def whole_product(layer: LinearBase) -> Any:
    """Return what multiplies for a layer, if the layer asks it once a call and adds nothing."""
    is_plain = type(layer).forward in _PLAIN_FORWARDS and layer.tp_size == 1
    is_unquantized = type(layer.quant_method) is UnquantizedLinearMethod
    return getattr(layer, "cpu_linear", None) if is_plain and is_unquantized else None


def wrap_head(processor: nn.Module, hook: Callable[[Tensor, Tensor], None]) -> None:
    """Let `hook` see hidden states and logits before the processor caps and scales them.

    vLLM applies the head's weight by itself, not through the head's forward.
    """
    wrapped: Any = processor
    apply_head = wrapped._apply_head

    def apply_and_hook(lm_head: nn.Module, hidden: Tensor, bias: Tensor | None) -> Tensor:
        logits: Tensor = apply_head(lm_head, hidden, bias)
        hook(hidden, logits)
        return logits

    wrapped._apply_head = apply_and_hook


def note_logits(model: nn.Module, note: Callable[[Tensor], None]) -> None:
    """Let `note` see the rows of which logits are asked, before the model changes them.

    Some models norm them first, and what their head gets is no view of the step's rows any more.
    """
    noted: Any = model
    compute_logits = noted.compute_logits

    def note_and_compute(hidden: Tensor, *more: Any, **options: Any) -> Any:
        note(hidden)
        return compute_logits(hidden, *more, **options)

    noted.compute_logits = note_and_compute


def linear_parts(name: str, layer: LinearBase, model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the Hugging Face modules that one vLLM linear layer holds.

    A fused layer (qkv_proj) holds several, one after the other along its output.
    Returns: per module path, its first output column and its number of output columns.
    """
    prefix, dot, last = name.rpartition(".")
    packed: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    parts = [f"{prefix}{dot}{part}" for part in packed.get(last, [last])]
    sizes: list[int] = list(getattr(layer, "output_sizes", [layer.output_size]))
    if len(parts) == 1:
        # One matrix in the Hugging Face model too, as Phi-3's qkv_proj.
        return {parts[0]: (0, sum(sizes))}
    if len(parts) != len(sizes):
        raise EngineSeamError(
            f"{name}: vLLM holds {len(sizes)} parts and names {len(parts)}, the same number is "
            "expected; this model's layers are not served yet"
        )
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return dict(zip(parts, zip(starts, sizes, strict=True), strict=True))


def vllm_module_name(module: str, model: nn.Module) -> str:
    """Return the path that vLLM gives to a module of the Hugging Face model."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return module
    suffix = ".lora_A.weight"  # vLLM's mapping rules are for names of tensors
    mapped = mapper.get_rename_mapper().map_name(module + suffix)
    return module if mapped is None else str(mapped).removesuffix(suffix)


def drop_lora_info(engine: Any) -> None:
    """Let vLLM's metrics leave out `vllm:lora_requests_info`.

    It makes a new series for every combination of adapters that run or wait together, by their
    digests, and keeps it for ever; no option leaves it out. With --disable-log-stats there are no
    metrics.
    Args: engine: vLLM's client in the server's process.
    """
    manager = engine.logger_manager
    for stat_logger in () if manager is None else manager.stat_loggers:
        if hasattr(stat_logger, "gauge_lora_info"):
            stat_logger.gauge_lora_info = None


def replace_template_writer(
    renderer: Any, make: Callable[[Callable[..., Awaitable[Any]]], Callable[..., Awaitable[Any]]]
) -> bool:
    """Put what `make` makes of it in the place of what applies chat templates.

    Returns: whether there is such a thing; some tokenizers write chats by themselves.
    """
    if not isinstance(renderer, HfRenderer):
        return False
    written: Any = renderer
    written._apply_chat_template_async = make(written._apply_chat_template_async)
    return True


def without_developer(conversation: Any, template: str) -> Any:
    """Return a conversation as vLLM gives it to a template that may not know developers."""
    is_developed = any(message["role"] == "developer" for message in conversation)
    if not is_developed or hf._detect_developer_role_support(template):
        return conversation
    return hf._consolidate_system_messages(hf._convert_developer_to_system(conversation))


def refuse_outlines_unasked() -> None:
    """Let vLLM take no grammar to outlines by itself; a server that is set to it uses it.

    It goes there with schemas that its other libraries do not know (patternProperties beside what
    xgrammar lacks), and outlines makes a table of all texts and tokens before the first one: 1.1 GB
    for an object that has one text of 1,000 characters, in the process that steps.
    """
    module: Any = backend_outlines
    validate = module.validate_structured_output_request_outlines

    def validate_if_set(params: SamplingParams) -> None:
        asked = params.structured_outputs
        if asked is not None and asked._backend == "outlines":
            validate(params)
            return
        raise VLLMValidationError(
            "The grammar asks for what the server's libraries do not do together; leave out "
            "patternProperties, or what xgrammar does not support."
        )

    module.validate_structured_output_request_outlines = validate_if_set
