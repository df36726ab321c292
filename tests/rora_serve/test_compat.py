"""The private names of vLLM that we touch are where engine/compat.py expects them."""

import importlib
import inspect
import re
import tempfile
import time
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import zmq
from torch import Tensor, nn
from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.forward_context import ForwardContext
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers import utils
from vllm.model_executor.layers.fused_moe import layer as fused_moe_layer
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.interfaces_base import VllmModel
from vllm.platforms.cpu import CpuPlatform
from vllm.renderers.hf import HfRenderer
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.utils.ompmultiprocessing import OMPProcessManager
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.utils import CoreEngineProcManager
from vllm.v1.executor import multiproc_executor
from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProc
from vllm.v1.metrics.loggers import PrometheusStatLogger, StatLoggerManager
from vllm.v1.sample import sampler
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin
from vllm.v1.worker.utils import allocate_kv_cache
from vllm.v1.worker.worker_base import WorkerWrapperBase

from adapters.errors import EngineSeamError
from rora_serve.engine import compat
from rora_serve.engine.forking import ForkingContext
from rora_serve.engine.manager import RaggedLoraManager
from rora_serve.engine.platform_plugin import SEAM_FLAG, platform_plugin
from rora_serve.engine.threads import Threads
from rora_serve.engine.worker import RaggedCpuWorker


def test_the_installed_vllm_is_a_tested_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compat.check_vllm_version()
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(EngineSeamError, match=r"vLLM 0\.33\.0: a version 0\.32\.x is expected"):
        compat.check_vllm_version()


def test_the_runner_loads_its_lora_model_by_the_method_that_we_replace() -> None:
    assert "self.load_lora_model(self.model" in inspect.getsource(CPUModelRunner.load_model)
    parameters = list(inspect.signature(LoRAModelRunnerMixin.load_lora_model).parameters)
    assert parameters == ["self", "model", "vllm_config", "device"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_multiply_by_the_product_that_we_make(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """By vLLM's own methods, with vLLM's own product where none is made."""
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    made = []

    class Product:
        def __init__(self, weight: Tensor) -> None:
            self.weight = weight
            self.is_packed = False

        def pack(self) -> None:
            self.is_packed = True

        def __call__(self, x: Tensor, _: Tensor, bias: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, bias) + 1

    def make(weight: Tensor) -> Product | None:
        if weight.dtype == torch.float32:
            made.append(Product(weight))
            return made[-1]
        return None

    compat.replace_products(lambda _: pytest.fail("the later one counts"))
    compat.replace_products(make)
    methods = (UnquantizedLinearMethod(), True), (UnquantizedEmbeddingMethod(), False)
    for method, is_weight_taken in methods:
        layer: Any = nn.Module()
        weight = torch.randn(64, 32, dtype=dtype)
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        bias = torch.randn(64, dtype=dtype)
        x = torch.randn(3, 32, dtype=dtype)
        method.process_weights_after_loading(layer)
        y = method.apply(layer, x, bias)
        own = dtype == torch.float32
        torch.testing.assert_close(y, nn.functional.linear(x, weight, bias) + (1 if own else 0))
        assert (layer.weight.numel() == 0) == is_weight_taken
        if own:
            assert made.pop().is_packed == is_weight_taken, "what is not multiplied is not copied"


LINEAR_LAYERS: dict[str, Any] = {
    "replicated": lambda **how: ReplicatedLinear(32, 64, **how),
    "column": lambda **how: ColumnParallelLinear(32, 64, **how),
    "merged": lambda **how: MergedColumnParallelLinear(32, [24, 40], **how),
    "row": lambda **how: RowParallelLinear(32, 64, **how),
}


class Product:
    """Knows how often it was asked."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.clone()
        self.calls: list[tuple[Tensor | None, Tensor | None]] = []

    def pack(self) -> None:
        pass

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        self.calls.append((weight, bias))
        return nn.functional.linear(x, self.weight, bias)


class Doubling(ReplicatedLinear):
    """Does more than its product."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(2 * x)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("is_bias_left", [False, True])
@pytest.mark.parametrize("kind", LINEAR_LAYERS)
def test_vllms_linear_layers_return_what_their_product_does(
    monkeypatch: pytest.MonkeyPatch, kind: str, is_bias_left: bool
) -> None:
    """Once a call, unchanged, so that what is added to the product is added to the layer."""
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    compat.replace_products(Product)
    layer = LINEAR_LAYERS[kind](bias=True, skip_bias_add=is_bias_left)
    other = LINEAR_LAYERS[kind](bias=True)
    assert layer.quant_method is not other.quant_method, "ours is for one layer"
    weight, bias, x = torch.randn(64, 32), torch.randn(64), torch.randn(3, 32)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    layer.quant_method.process_weights_after_loading(layer)
    product = compat.whole_product(layer)
    assert isinstance(product, Product)
    y, left = layer(x)
    expected = nn.functional.linear(x, weight, None if is_bias_left else bias)
    torch.testing.assert_close(y, expected)
    assert (left is layer.bias) == is_bias_left
    ((given_weight, given_bias),) = product.calls
    assert given_weight is None, "it was asked straight away"
    assert (given_bias is None) == is_bias_left


@pytest.mark.usefixtures("one_process")
def test_layers_that_do_more_than_multiply_are_not_taken_for_their_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    compat.replace_products(Product)

    for make in (Doubling, ReplicatedLinear):
        layer = make(32, 64)
        assert compat.whole_product(layer) is None, "its weight was not read yet"
        layer.quant_method.process_weights_after_loading(layer)
        assert (compat.whole_product(layer) is None) == (make is Doubling)
    quantized: Any = layer
    quantized.quant_method = object()
    assert compat.whole_product(layer) is None, "it is quantized"


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deltas_hang_on_products_where_they_can_and_on_layers_elsewhere(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """In one place or the other, so that no adapter is added twice or not at all."""
    products = importlib.import_module("rora_serve.engine.products")
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    compat.replace_products(partial(products.new_product, threads=Threads(1)))

    model: Any = nn.Module()
    model.plain, model.doubling = (
        make(32, 64, params_dtype=dtype) for make in (ReplicatedLinear, Doubling)
    )
    for layer in (model.plain, model.doubling):
        layer.quant_method.process_weights_after_loading(layer)
    RaggedLoraManager(model, dtype, is_compiled=False)
    is_on_product = dtype == torch.float32 and products.HAS_AVX2
    assert (type(model.plain) is ReplicatedLinear) == is_on_product
    if is_on_product:
        assert model.plain.cpu_linear._addition is not None
        assert model.doubling.cpu_linear._addition is None
    assert type(model.doubling) is not Doubling


def test_our_manager_has_every_method_that_the_runner_calls() -> None:
    source = inspect.getsource(LoRAModelRunnerMixin)
    called = {
        part.split("(")[0].split(")")[0].strip() for part in source.split("self.lora_manager.")[1:]
    }
    called.discard("create_lora_manager")  # of the manager that ours replaces
    assert called >= {"set_active_adapters", "add_adapter", "remove_adapter", "list_adapters"}
    missing = {name for name in called if not hasattr(RaggedLoraManager, name)}
    assert not missing
    for name in called & set(dir(LRUCacheWorkerLoRAManager)):
        theirs = inspect.signature(getattr(LRUCacheWorkerLoRAManager, name))
        ours = inspect.signature(getattr(RaggedLoraManager, name))
        assert len(ours.parameters) == len(theirs.parameters), name


def test_only_models_that_say_so_take_adapters() -> None:
    """As in vLLM's own method, which ours replaces."""
    assert "if not supports_lora(model):" in inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    runner: Any = SimpleNamespace()
    compat.replace_lora_manager(runner, lambda _: "ours")
    taken = type("Adaptable", (nn.Module, SupportsLoRA), {})()
    assert runner.load_lora_model(taken) is taken
    assert runner.lora_manager == "ours"
    with pytest.raises(EngineSeamError, match="Packed: vLLM does not support adapters of this"):
        runner.load_lora_model(Packed())


def test_experts_are_mixed_by_the_configuration_that_we_replace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = "is_lora_enabled=vllm_config.lora_config is not None"
    source = inspect.getsource(fused_moe_layer)
    assert source.count("FusedMoEConfig(\n") == source.count(made) == 1
    monkeypatch.setattr(fused_moe_layer, "FusedMoEConfig", dict)
    compat.mix_experts_as_without_lora()
    module: Any = fused_moe_layer
    assert module.FusedMoEConfig(num_experts=3, is_lora_enabled=True) == {
        "num_experts": 3, "is_lora_enabled": False,
    }  # fmt: skip


def test_a_dummy_run_selects_dummy_adapters_that_the_manager_was_given() -> None:
    runs = inspect.getsource(GPUModelRunner._dummy_run)
    assert "with self.maybe_dummy_run_with_lora(" in runs
    assert {"num_tokens", "num_active_loras", "uniform_decode", "force_attention"} <= set(
        inspect.signature(GPUModelRunner._dummy_run).parameters
    )
    assert "sm.fill_(-1)" in runs, "nothing is put into the cache"
    given = inspect.getsource(LoRAModelRunnerMixin.maybe_setup_dummy_loras)
    assert "for lora_id in range(1, num_loras + 1)" in given
    assert "self.lora_manager.add_dummy_lora(lr, rank=lora_warmup_rank)" in given
    selected = inspect.getsource(LoRAModelRunnerMixin.maybe_select_dummy_loras)
    assert "for lora_id in range(1, effective_num_loras + 1)" in selected


def test_a_runner_calls_its_model_by_names_and_groups_its_layers_of_attention() -> None:
    """Which a model's stand-in takes, and by which it is known whose step layers are told of."""
    calls = inspect.getsource(GPUModelRunner._model_forward)
    names = ("input_ids", "positions", "intermediate_tensors", "inputs_embeds")
    assert "return self.model(" in calls
    assert all(f"{name}={name}" in calls for name in names)
    assert list(inspect.signature(VllmModel.forward).parameters)[1:3] == ["input_ids", "positions"]
    assert "embed_input_ids" in vars(VllmModel)
    made = inspect.getsource(GPUModelRunner.initialize_attn_backend)
    assert "self.attn_groups.append(create_attn_groups(" in made
    group = SimpleNamespace(get_metadata_builder=lambda: "a")
    runner = SimpleNamespace(attn_groups=[[group], [group, group]])
    assert compat.metadata_builders(runner) == ["a"] * 3
    assert "attn_metadata" in {field.name for field in fields(ForwardContext)}


def test_a_step_is_two_calls_to_the_worker_the_second_only_where_the_first_returns_none() -> None:
    step = inspect.getsource(EngineCore.step)
    second = "output is None:\n                model_output = self.model_executor.sample_tokens("
    assert step.index(".execute_model(") < step.index(second)
    assert step.count(".sample_tokens(") == 1
    # And not that engine which makes steps ahead, and always asks for both.
    assert "self.step if self.batch_queue is None" in inspect.getsource(EngineCore.__init__)
    is_off = "scheduler_config.async_scheduling = False"
    assert is_off in inspect.getsource(CpuPlatform.check_and_update_config)
    for name in ("execute_model", "sample_tokens"):
        assert f'"{name}"' in inspect.getsource(getattr(MultiprocExecutor, name))
        theirs = inspect.signature(getattr(CPUWorker, name))
        ours = inspect.signature(getattr(RaggedCpuWorker, name))
        assert ours.parameters.keys() == theirs.parameters.keys()


def test_a_step_has_no_grammar_where_it_says_so() -> None:
    """So that the worker may make its second half by itself."""
    grammar = inspect.getsource(Scheduler.get_grammar_bitmask)
    says = "if not scheduler_output.has_structured_output_requests:\n            return None"
    assert says in grammar
    step = inspect.getsource(EngineCore.step)
    assert step.index(".schedule(") < step.index(".execute_model(")
    says = "scheduler_output.has_structured_output_requests |="
    assert says in inspect.getsource(Scheduler._update_after_schedule)
    assert SchedulerOutput.has_structured_output_requests is False  # until one is scheduled


@pytest.mark.parametrize(
    ("first", "has_grammar", "expected"),
    [(None, False, "sampled"), (None, True, None), ("nothing to do", False, "nothing to do")],
    ids=str,
)
def test_the_worker_makes_both_halves_of_a_step_unless_a_grammar_comes_between(
    first: str | None, has_grammar: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPUWorker, "execute_model", lambda *_: first)
    monkeypatch.setattr(CPUWorker, "sample_tokens", lambda *_: "sampled")
    worker = object.__new__(RaggedCpuWorker)
    worker._ragged = None
    output = SchedulerOutput.make_empty()
    output.has_structured_output_requests = has_grammar
    assert worker.execute_model(output) == expected


def test_handlers_look_adapters_up_in_the_mapping_that_we_replace() -> None:
    for method in (BaseServing._check_model, BaseServing._maybe_get_adapters):
        assert "self.models.lora_requests" in inspect.getsource(method)


def test_chats_are_written_by_the_method_that_we_replace() -> None:
    name = "self._apply_chat_template_async"
    assert f"{name} = make_async(" in inspect.getsource(HfRenderer.__init__)
    writing = inspect.getsource(HfRenderer.render_messages_async)
    assert writing.count(name) == 1
    assert (
        "                model_config,\n                tokenizer,\n                conversation,"
        in writing
    )
    expected = ["self", "request", "messages", "default_template"]
    expected.append("default_template_content_format")
    assert list(inspect.signature(OnlineRenderer.preprocess_chat).parameters)[:5] == expected


def test_developers_become_systems_where_a_template_does_not_know_them() -> None:
    said = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
    assert compat.without_developer(said, "{{ 'developer' }}") == said
    assert compat.without_developer(said, "") == [{"role": "system", "content": "a\n\nb"}]


def test_log_probs_need_no_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own way does; two tokens, of which one is the third likeliest."""
    compiled = "_torchdynamo_orig_callable"
    log_probs = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]).log()
    module: Any = sampler
    theirs = module.batched_count_greater_than
    monkeypatch.setattr(module, "batched_count_greater_than", theirs)  # to be put back
    compat.rank_tokens_uncompiled()
    assert hasattr(theirs, compiled)
    assert not hasattr(module.batched_count_greater_than, compiled)
    found = sampler.Sampler.gather_logprobs(log_probs, 2, torch.tensor([2, 2]))
    assert found.logprob_token_ids.tolist() == [[2, 2, 1], [2, 0, 1]]
    assert found.selected_token_ranks.tolist() == [1, 3]


def test_the_platform_sets_a_worker_class() -> None:
    assert "parallel_config.worker_cls" in inspect.getsource(CpuPlatform.check_and_update_config)
    assert hasattr(CPUWorker, "init_device")


def test_the_platform_looks_at_lora_for_nothing_but_compilation() -> None:
    """So that ours can hide it while vLLM's decides."""
    source = inspect.getsource(CpuPlatform)
    assert source.count("lora_config") == 1
    after = source.partition("if vllm_config.lora_config is not None:")[2]
    assert after.split()[:3] == ["compilation_config.mode", "=", "CompilationMode.NONE"]


def test_readers_of_messages_are_made_with_the_default_that_we_change() -> None:
    parameters = list(inspect.signature(SpinCondition.__init__).parameters.values())
    assert [p.name for p in parameters if p.default is not p.empty] == ["busy_loop_s"]
    source = inspect.getsource(MessageQueue)
    assert "busy_loop_s" not in source
    # By name, as ours takes them.
    assert source.count("SpinCondition(") == source.count("is_reader=") == 2
    source = inspect.getsource(SpinCondition.wait)
    assert "if current_time <= self.last_read + self.busy_loop_s:" in source


def test_who_waits_asleep_is_woken_by_each_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own, the control, is not by those that come within a millisecond."""
    before: Any = SpinCondition.__init__
    monkeypatch.setattr(SpinCondition, "__init__", before)  # to be put back
    monkeypatch.setattr(before, "__defaults__", (0,))
    assert lost_wake_ups() > 0
    compat.sleep_between_messages()
    assert inspect.signature(before).parameters["busy_loop_s"].default == 0
    assert lost_wake_ups() == 0


def lost_wake_ups() -> int:
    """Return how many of many wake-ups, each sent as soon as the last one came, do not come."""
    with zmq.Context() as context, tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/notify"
        writer = SpinCondition(is_reader=False, context=context, notify_address=address)
        reader = SpinCondition(is_reader=True, context=context, notify_address=address)
        sockets = [writer.local_notify_socket, reader.local_notify_socket]
        writer.notify()
        while not sockets[1].poll(10):  # until they are connected
            writer.notify()
        time.sleep(0.1)
        reader.wait(1000)
        lost = 0
        for _ in range(100):
            writer.notify()
            came = bool(sockets[1].poll(50))
            reader.wait(0)
            lost += not came
        for socket in (*sockets, reader.read_cancel_socket, reader.write_cancel_socket):
            socket.close(0)
    return lost


def test_processes_are_made_by_the_context_that_we_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, and with any context but one named "fork" as with new interpreters."""
    modules: tuple[Any, ...] = (engine_utils, multiproc_executor)
    for module in modules:
        monkeypatch.setattr(module, "get_mp_context", module.get_mp_context)  # to be put back
    for starts in (
        CoreEngineProcManager.__init__,
        MultiprocExecutor._init_executor,
        WorkerProc.make_worker_process,
    ):
        assert "context = get_mp_context()" in inspect.getsource(starts)
    source = inspect.getsource(multiproc_executor)
    assert source.count("get_start_method()") == source.count('get_start_method() == "fork"') == 1
    context = ForkingContext()
    compat.fork_processes(context)
    for replaced in modules:
        assert replaced.get_mp_context() is context


def test_the_worker_is_bound_to_cores_by_what_forks_read() -> None:
    source = inspect.getsource(OMPProcessManager.configure_omp_envs)
    names = set(re.findall(r'envs_dict\["(\w+)"\]', source))
    assert names == {
        "OMP_NUM_THREADS", "OMP_PLACES", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY",
        "KMP_AFFINITY", "KMP_BLOCKTIME", "KMP_TPAUSE",
    }  # fmt: skip
    assert (
        """cpu_list_str = ",".join(cpu_list)
            envs_dict["OMP_PLACES"] = f"{{{cpu_list_str}}}\""""
        in source
    )


def test_preloaded_modules_are_where_processes_begin() -> None:
    assert EngineCore.__module__ in preloaded_modules()
    assert {CPUWorker.__module__, WorkerProc.__module__} <= preloaded_modules()
    assert RaggedCpuWorker.__module__ in preloaded_modules()


def preloaded_modules() -> set[str]:
    """Return what the module would import, which tests do not import."""
    spec = find_spec("rora_serve.engine.preloaded")
    assert spec is not None
    assert spec.origin is not None
    return set(re.findall(r'^    "([\w.]+)",$', Path(spec.origin).read_text(), re.MULTILINE))


def test_the_kv_cache_is_made_of_zeros_that_we_replace() -> None:
    makes = "buf = torch.zeros(buf_size, dtype=torch.int8, device=device)"
    source = inspect.getsource(allocate_kv_cache)
    assert source.count("torch.zeros(") == source.count(makes) == 1
    ours = inspect.signature(RaggedCpuWorker.initialize_from_config).parameters.keys()
    assert ours == inspect.signature(CPUWorker.initialize_from_config).parameters.keys()


def test_plugins_are_loaded_before_a_process_listens() -> None:
    for start, listens in (
        (EngineCore.__init__, "executor_class("),
        (WorkerProc.__init__, "self._init_message_queues("),
    ):
        source = inspect.getsource(start)
        loads = "load_general_plugins()" if start is EngineCore.__init__ else "init_worker("
        assert 0 <= source.index(loads) < source.index(listens)
    assert "load_general_plugins()" in inspect.getsource(WorkerWrapperBase.init_worker)


def test_logits_are_computed_by_the_method_that_we_wrap() -> None:
    for method in (LogitsProcessor._get_logits, LogitsProcessor.get_top_tokens):
        assert "self._apply_head(lm_head, hidden_states, embedding_bias)" in inspect.getsource(
            method
        )


def test_rows_of_logits_are_a_copy_of_samples_or_a_view_of_a_prompt() -> None:
    """By which the manager tells them apart."""
    source = inspect.getsource(GPUModelRunner)
    assert "sample_hidden_states = hidden_states[logits_indices]" in source
    assert "prompt_hidden_states = hidden_states[offset : offset + num_logits]" in source
    for rows in ("sample_hidden_states", "prompt_hidden_states"):
        assert f"self.model.compute_logits({rows})" in source


@pytest.mark.parametrize(("flag", "expected"), [("1", True), ("0", False), (None, False)])
def test_our_platform_is_named_only_for_our_own_server(
    monkeypatch: pytest.MonkeyPatch, flag: str | None, expected: bool
) -> None:
    monkeypatch.delenv(SEAM_FLAG, raising=False)
    if flag is not None:
        monkeypatch.setenv(SEAM_FLAG, flag)
    assert (platform_plugin() is not None) is expected


def test_we_step_aside_on_gpu_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEAM_FLAG, "1")
    monkeypatch.setattr("vllm.platforms.cpu_platform_plugin", lambda: None)
    assert platform_plugin() is None


class Packed(nn.Module):
    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


class Layer:
    """What linear_parts reads of a vLLM layer, which can not be made without an engine."""

    def __init__(self, output_size: int, output_sizes: list[int] | None = None) -> None:
        self.output_size = output_size
        if output_sizes is not None:
            self.output_sizes = output_sizes


def test_a_fused_layer_holds_its_modules_one_after_the_other() -> None:
    layer: Any = Layer(20, [12, 4, 4])
    assert compat.linear_parts("m.0.qkv_proj", layer, Packed()) == {
        "m.0.q_proj": (0, 12),
        "m.0.k_proj": (12, 4),
        "m.0.v_proj": (16, 4),
    }
    plain: Any = Layer(6)
    assert compat.linear_parts("m.0.o_proj", plain, Packed()) == {"m.0.o_proj": (0, 6)}
    # Fused in the Hugging Face model too.
    assert compat.linear_parts("m.0.qkv_proj", layer, nn.Module()) == {"m.0.qkv_proj": (0, 20)}
    odd: Any = Layer(20, [16, 4])
    with pytest.raises(EngineSeamError, match="holds 2 parts and names 3"):
        compat.linear_parts("m.0.qkv_proj", odd, Packed())


def test_vllms_metric_of_adapters_is_made_only_where_we_look() -> None:
    assert "self.logger_manager: StatLoggerManager | None = None" in inspect.getsource(AsyncLLM)
    assert "self.stat_loggers" in inspect.getsource(StatLoggerManager.__init__)
    source = inspect.getsource(PrometheusStatLogger)
    assert source.count("vllm:lora_requests_info") == 2  # and a warning
    assert source.count("self.gauge_lora_info.labels") == 1
    record = inspect.getsource(PrometheusStatLogger.record)
    guard, _, _ = record.partition("self.gauge_lora_info.labels")
    assert "if self.gauge_lora_info is not None:" in guard


def test_vllms_metric_of_adapters_is_dropped() -> None:
    prometheus = SimpleNamespace(gauge_lora_info=object())
    other = SimpleNamespace()
    compat.drop_lora_info(
        SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=[other, prometheus]))
    )
    assert prometheus.gauge_lora_info is None
    assert vars(other) == {}
    compat.drop_lora_info(SimpleNamespace(logger_manager=None))


def test_every_call_of_generate_fits_our_wrapper() -> None:
    parameters = inspect.signature(AsyncLLM.generate).parameters.values()
    open_ones = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert open_ones == ["self", "prompt", "sampling_params", "request_id"]
