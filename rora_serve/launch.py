"""Starting vLLM's own OpenAI server with our plug-ins, and stopping with an honest exit code."""

import argparse
import asyncio
import gc
import hashlib
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil

from adapters import AdapterStore, ResolvedVersion
from adapters.base_model import cache_folder
from adapters.errors import (
    AdapterMismatchError,
    ConfigError,
    EngineSeamError,
    RoraError,
    StoreError,
)
from adapters.receipt import BaseShapes
from adapters.store import verify
from rora_serve.admission import Admission
from rora_serve.catalog import Catalog
from rora_serve.chat_templates import TemplateProcess
from rora_serve.config import ServeConfig
from rora_serve.engine.forking import FEW_CORES, can_fork, fork_server
from rora_serve.engine.handover import SOCKET_VARIABLE, refusal_file
from rora_serve.engine.platform_plugin import SEAM_FLAG, SLEEP_FLAG
from rora_serve.intake import Intake
from rora_serve.key_file import KeyFile, kept_secret
from rora_serve.lifetime import Lifetime
from rora_serve.limits import Limiter
from rora_serve.loader import Loader
from rora_serve.memory import adapter_memory
from rora_serve.metrics import Levels, Metrics
from rora_serve.models import ModelDirectory, ServedBase, check_names, read_base
from rora_serve.preload import Preloader, PreloadPlan, make_plan
from rora_serve.request_log import log_to, warn_on
from rora_serve.residency import Residents
from rora_serve.side_process import SideProcess
from rora_serve.vllm_options import engine_options, is_cpu_build, parse_options

if TYPE_CHECKING:
    from fastapi import FastAPI
    from vllm.engine.protocol import EngineClient

_DEATH_SECONDS = 7.0  # from the engine's death; vLLM ends its server after 5
_KERNEL_SOURCES = (
    "activations",
    "attention",
    "instructions",
    "kernels",
    "products",
    "replay",
    "row_functions",
    "slots",
    "tiles",
)
_SHARED_MEMORY_BYTES = 400 * 1024**2


def launch(config: ServeConfig, model: Path, *, base_name: str, vllm_options: list[str]) -> int:
    """Serve until a signal or the engine's death. Returns: 0 after a signal, 1 after a death.

    Args:
        model: folder of the base model.
        base_name: what requests call it.
        vllm_options: command-line options for vLLM, as given after `--`.

    Raises:
        ConfigError: an option that is ours to set, or that vLLM refuses; a name of `preload` or
            `pin` that is not there, or more of them than fit.
        PreloadError: one of them can not be served.
        EngineSeamError: the engine came up without our layers; nothing was served.
    """
    gc.disable()  # imports make a million objects that stay; looking through them takes 1.5 s
    _check_shared_memory()
    _set_environment()
    signal.signal(signal.SIGTERM, _end_start)  # until vLLM installs its own handler
    with tempfile.TemporaryDirectory(prefix="rora-serve-") as own:
        os.environ[SOCKET_VARIABLE] = str(Path(own, "worker"))
        os.environ["NUMBA_CACHE_DIR"] = str(kernel_cache(Path(own)))
        # torch.compile reads what vLLM sets when it is imported, too early in the fork server.
        is_forked = not config.compile and can_fork(os.environ, vllm_options)
        with fork_server() if is_forked else nullcontext():
            return _launch(config, model, base_name=base_name, vllm_options=vllm_options)


def _launch(config: ServeConfig, model: Path, *, base_name: str, vllm_options: list[str]) -> int:
    """Serve, now that the environment is set, which vLLM reads when it is imported."""
    from rora_serve.engine.compat import check_vllm_version  # noqa: PLC0415  (imports vLLM)

    check_vllm_version()
    _confirm_platform()
    import uvloop  # noqa: PLC0415  (comes with vLLM)

    own_options = engine_options(config, model, base_name, vllm_options)
    arguments = parse_options(own_options, vllm_options)
    store = AdapterStore(config.store)
    names = tuple(arguments.served_model_name)
    check_names(names, store)
    base, shapes = read_base(model, names)
    if arguments.chat_template is not None:
        base = replace(base, chat_template=_served_template(arguments.chat_template))
    keys = _open_keys(config)
    dtype = arguments.dtype if is_cpu_build() else None
    capacity = adapter_memory(config.adapter_memory_bytes, model, dtype=dtype)
    plan = make_plan(
        store, preload=config.preload, pin=config.pin, base_names=names, capacity=capacity
    )
    if plan.problems:
        raise ConfigError("; ".join(plan.problems))
    parts = _Parts(config, base, shapes, store, keys, capacity, plan)
    try:
        died = uvloop.run(_serve(arguments, parts))
    except RoraError:
        raise
    except (RuntimeError, ValueError, OSError, EOFError) as error:  # what vLLM raises as it starts
        if refusal_file().exists():
            raise EngineSeamError(refusal_file().read_text()) from error
        first_line = str(error).strip().partition("\n")[0]
        raise EngineSeamError(
            f"the engine did not start ({first_line}); its log above says why"
        ) from error
    if died:
        print("rora-serve: the engine died; its log above says why", file=sys.stderr)
    return 1 if died else 0


@dataclass(frozen=True)
class _Parts:
    """What is known before the engine starts.

    Args:
        capacity: bytes that adapters may take in memory.
        preload: what is to be there before the server is ready.
    """

    config: ServeConfig
    base: ServedBase
    shapes: BaseShapes
    store: AdapterStore
    keys: KeyFile | None
    capacity: int
    preload: PreloadPlan


def _open_keys(config: ServeConfig) -> KeyFile | None:
    """Return the tenants' keys. Raises: ConfigError: every mistake in their file."""
    if config.keys is None:
        return None
    secret = kept_secret(cache_folder(os.environ) / "cache-secret")
    return KeyFile(config.keys, cache_secret=secret)


def _end_start(*_: object) -> NoReturn:
    """End at once on a SIGTERM that comes while the server starts: nothing is served yet."""
    _end_at_once(128 + signal.SIGTERM)


def _end_after_death() -> NoReturn:
    """End a server whose engine died and whose own way out takes too long."""
    print("rora-serve: the engine died; its log above says why", file=sys.stderr, flush=True)
    _end_at_once(1)


def _end_at_once(exit_code: int) -> NoReturn:
    """End all processes. An exception would do, were it not lost in callbacks of the event loop."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
    os._exit(exit_code)


def _check_shared_memory() -> None:
    """Refuse a container's small /dev/shm before vLLM's processes fail to talk through it.

    Raises: ConfigError: less room than vLLM's queues take, 160 MiB to the worker and 240 MiB back.
    """
    shared = Path("/dev/shm")  # noqa: S108  (its room is looked at, nothing is written)
    if not shared.is_dir():
        return
    free = shutil.disk_usage(shared).free
    if free < _SHARED_MEMORY_BYTES:
        raise ConfigError(
            f"{shared}: {free >> 20} MiB free, {_SHARED_MEMORY_BYTES >> 20} MiB are expected; "
            "start the container with --shm-size 1g"
        )


def _set_environment() -> None:
    """Set what vLLM's processes read from the environment, before any of them starts."""
    os.environ[SEAM_FLAG] = "1"
    # The V2 model runner has no place for our LoRA manager.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # vLLM keeps a core free for its other processes. Of two that is half of what there is: with
    # both, SmolLM2-135M decodes 1.4 times and reads prompts 1.8 times as fast. Then nothing else
    # may keep a core busy.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    quota = _cpu_quota()
    if quota is not None and quota < len(cores):
        # Of which cores the time is nobody has said; a thread for each would wait for its turn at
        # every barrier, and bound to the first ones they would meet those of other containers.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))
    elif 0 < len(cores) <= FEW_CORES:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    if 0 < min(len(cores), quota or len(cores)) <= FEW_CORES:
        os.environ[SLEEP_FLAG] = "1"
        # OpenMP's threads look for the next loop for milliseconds before they sleep, and between
        # steps every core is wanted by the engine's and the server's process. This many looks are
        # enough for what Python takes from one loop of a step to the next.
        if "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault("GOMP_SPINCOUNT", "40000")
    # Clients and proxies keep idle connections for 5 s (httpx) to 90 (Go), vLLM's server for 5. The
    # client must be who closes first: else a request goes out as its connection ends.
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "100")
    # What is large, weights above all, lies in pages of 2 MiB where the system lets processes ask
    # for them, and is read faster. C's allocator takes this at the start of a process only.
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    if os.environ.get("VLLM_API_KEY"):
        raise ConfigError(
            "VLLM_API_KEY: set, but vLLM's key guards only some routes, and none before an adapter "
            "is loaded; unset it and listen on a private address"
        )
    for name in (
        # Each would let a request reach an adapter past the front door.
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",
        "VLLM_SKIP_MODEL_NAME_VALIDATION",
        # With it a response in the background goes on after its request has ended.
        "VLLM_ENABLE_RESPONSES_API_STORE",
        # With it our metrics would not stand beside vLLM's.
        "PROMETHEUS_MULTIPROC_DIR",
    ):
        os.environ.pop(name, None)


def _cpu_quota(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return how many cores' time a container may take, rounded up; None: as many as it sees."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):  # no container, or none with a quota
        return None


def kernel_cache(own: Path) -> Path:
    """Return where compiled kernels are kept: beside the models, or with this start's own files.

    numba looks at the source file of a function, and not at what that takes from others.
    """
    engine = Path(__file__).parent / "engine"
    sources = b"".join((engine / f"{name}.py").read_bytes() for name in _KERNEL_SOURCES)
    kept = cache_folder(os.environ) / "kernels" / hashlib.sha256(sources).hexdigest()[:12]
    try:
        kept.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=kept):
            return kept
    except OSError:  # a container that can only be read
        return own / "kernels"


def _confirm_platform() -> None:
    """See that vLLM took our platform, before an engine starts that could not serve.

    vLLM logs a plug-in that fails to load and goes on with its own platform.
    Raises: EngineSeamError: it did.
    """
    from vllm.platforms import current_platform  # noqa: PLC0415

    if is_cpu_build() and type(current_platform).__name__ != "RoraCpuPlatform":
        raise EngineSeamError(
            f"vLLM runs on {type(current_platform).__name__}, rora-serve's platform is expected; "
            "install rora-serve in this environment and leave VLLM_PLUGINS and "
            "VLLM_TARGET_DEVICE unset"
        )


def _served_template(given: str) -> str | None:
    """Return what vLLM takes `--chat-template` for: a file's content, or the template itself."""
    from vllm.renderers.chat_utils import load_chat_template  # noqa: PLC0415

    template: str | None = load_chat_template(given)
    return template


async def _serve(arguments: argparse.Namespace, parts: _Parts) -> bool:
    """Start engine and server, serve, and return whether the engine died."""
    from vllm import envs  # noqa: PLC0415
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state  # noqa: PLC0415
    from vllm.entrypoints.launchers.api_server.entry import (  # noqa: PLC0415
        build_async_engine_client,
    )
    from vllm.entrypoints.launchers.app import build_app  # noqa: PLC0415
    from vllm.entrypoints.launchers.launcher import serve_http, setup_server  # noqa: PLC0415

    from rora_serve.api.plugin import FRONT_DOOR  # noqa: PLC0415
    from rora_serve.engine.compat import drop_lora_info  # noqa: PLC0415
    from rora_serve.observed import observe  # noqa: PLC0415

    gc.freeze()
    gc.enable()
    address, sock = setup_server(arguments, reuse_port=False)
    loader = Loader(Path(os.environ[SOCKET_VARIABLE])) if is_cpu_build() else None
    process = SideProcess()
    templates = TemplateProcess()
    try:
        async with build_async_engine_client(arguments) as engine:
            decoding = "" if loader is None else await _confirm_engine_seam(engine)
            drop_lora_info(engine)
            observe(engine)
            log_to(sys.stderr)
            warn_on(sys.stderr)
            tasks = await engine.get_supported_tasks()
            arguments.middleware = [FRONT_DOOR]
            app = build_app(arguments, tasks, engine.model_config)
            await init_app_state(engine, app.state, arguments, tasks)
            stopped = threading.Event()  # after which an engine that is gone did not die
            lifetime = Lifetime(lambda: stopped.is_set() or not engine.errored)
            _note_shutdown(engine, lifetime, stopped)
            preloader = _open_door(app, engine, loader, process, templates, parts, lifetime)
            print(
                f"rora-serve: {parts.base.names[0]} and {len(parts.store.names())} adapters of "
                f"{parts.store.root} at {address}{decoding}",
                file=sys.stderr,
            )
            lifetime.watch(_end_after_death, within=_DEATH_SECONDS)
            preloader.begin(lambda: _stop_serving(app, lifetime))
            # vLLM's handlers of signals, which this one takes the place of, come when it begins to
            # serve.
            loop = asyncio.get_running_loop()
            loop.call_soon(lifetime.drain_on_sigterm, parts.config.drain_seconds)
            # The arguments that vLLM's own server passes, so that its options after `--` hold here.
            shutdown = await serve_http(
                app,
                sock=sock,
                enable_ssl_refresh=arguments.enable_ssl_refresh,
                host=arguments.host,
                port=arguments.port,
                log_level=arguments.uvicorn_log_level,
                access_log=not arguments.disable_uvicorn_access_log,
                timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
                ssl_keyfile=arguments.ssl_keyfile,
                ssl_certfile=arguments.ssl_certfile,
                ssl_ca_certs=arguments.ssl_ca_certs,
                ssl_cert_reqs=arguments.ssl_cert_reqs,
                ssl_ciphers=arguments.ssl_ciphers,
                h11_max_incomplete_event_size=arguments.h11_max_incomplete_event_size,
                h11_max_header_count=arguments.h11_max_header_count,
            )
            is_stopped = stopped.is_set()  # by a signal; from here on it is in any case
            died = bool(engine.errored) and not is_stopped
            given_up = await preloader.end()
        await shutdown
        if given_up is not None and not is_stopped:
            raise given_up
    finally:
        sock.close()
        process.close()
        templates.close()
        if loader is not None:
            loader.close()
    return died


def _open_door(
    app: "FastAPI",
    engine: "EngineClient",
    loader: Loader | None,
    process: SideProcess,
    templates: TemplateProcess,
    parts: _Parts,
    lifetime: Lifetime,
) -> Preloader:
    """Put everything that requests go through into vLLM's app; return what fills its memory."""
    from prometheus_client import REGISTRY  # noqa: PLC0415  (comes with vLLM)

    from rora_serve.api.plugin import install  # noqa: PLC0415
    from rora_serve.api.reception import Reception  # noqa: PLC0415
    from rora_serve.api.routes import make_routes  # noqa: PLC0415
    from rora_serve.api.views import Views  # noqa: PLC0415
    from rora_serve.engine_probe import make_prober  # noqa: PLC0415

    config, base = parts.config, parts.base
    adapters = _Adapters(engine, loader)

    def read_levels() -> Levels:  # once all of it is there
        return Levels(
            host_bytes=directory.bytes_by_name(),
            host_used_bytes=directory.tier.num_bytes,
            host_capacity_bytes=directory.tier.capacity,
            adapters_held=directory.tier.num_held,
            requests_waiting=admission.num_waiting,
            requests_in_flight=admission.in_flight,
        )

    metrics = Metrics(base.names[0], read_levels)
    prober = make_prober(
        engine,
        parts.store,
        fingerprint=base.fingerprint,
        quarantined=metrics.count_quarantine,
    )
    directory = ModelDirectory(
        base,
        parts.store,
        adapters,
        capacity=parts.capacity,
        prober=prober,
        templates=templates,
        evicted=metrics.count_eviction,
    )
    admission = Admission(config.max_num_seqs, queue_per_tenant=config.queue_per_tenant)
    REGISTRY.register(metrics)  # whose content vLLM's /metrics is
    residents = Residents(directory)
    preloader = Preloader(directory, residents, parts.preload)
    catalog = Catalog(parts.shapes, process)
    intake = Intake(
        parts.store,
        parts.shapes,
        catalog,
        process,
        base_names=base.names,
        import_folders=config.import_from,
        admit=residents.try_out,
    )
    routes = make_routes(
        directory,
        residents,
        intake,
        Views(directory, residents, catalog, prober.read_quarantine),
        started=int(time.time()),
        is_ready=lambda: preloader.is_done and lifetime.is_ready,
        max_upload_bytes=config.max_upload_bytes,
    )
    reception = Reception(
        directory,
        admission,
        Limiter(),
        metrics,
        lifetime,
        max_model_len=engine.model_config.max_model_len,
        keys=parts.keys,
    )
    install(app, reception, routes)
    return preloader


def _stop_serving(app: "FastAPI", lifetime: Lifetime) -> None:
    """End `serve_http`, as vLLM does when its engine died."""
    lifetime.give_up()
    app.state.server.should_exit = True


def _note_shutdown(engine: "EngineClient", lifetime: Lifetime, stopped: threading.Event) -> None:
    """Set `stopped` when vLLM stops the engine, and end the requests that still run.

    An engine that was stopped and one that died both count as errored.
    """
    loop = asyncio.get_running_loop()
    shutdown = engine.shutdown

    def noted_shutdown(timeout: float | None = None) -> None:
        stopped.set()
        loop.call_soon_threadsafe(lifetime.give_up)  # vLLM calls this in a thread
        shutdown(timeout=timeout)

    engine.shutdown = noted_shutdown  # type: ignore[method-assign]


class _Adapters:
    """Brings adapters into an engine: past its loop into our layers, or by vLLM's own way on GPUs.

    Args: loader: that knows our layers, or None.
    """

    def __init__(self, engine: "EngineClient", loader: Loader | None) -> None:
        self._engine: Any = engine  # whose protocol has no remove_lora
        self._loader = loader

    async def load(self, lora_int_id: int, resolved: ResolvedVersion) -> int:
        if self._loader is not None:
            try:
                return await self._loader.load(lora_int_id, resolved)
            except StoreError:  # the loader's process ended, maybe after it had handed over
                await self.drop(lora_int_id)
                raise
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        await asyncio.to_thread(verify, resolved)
        digest = resolved.version.weights_digest
        try:
            await self._engine.add_lora(LoRARequest(digest, lora_int_id, str(resolved.folder)))
        except Exception as error:  # whatever its checks raise, in another process
            raise AdapterMismatchError(str(error)) from error
        return resolved.version.num_bytes

    async def drop(self, lora_int_id: int) -> None:
        # In the order of requests and of their ends, so that no step still needs it.
        await self._engine.remove_lora(lora_int_id)


async def _confirm_engine_seam(engine: "EngineClient") -> str:
    """Ask every worker whether our layers are in place, before the port answers.

    Returns: how steps of decoding are made, to be read behind the address.

    vLLM only logs a platform plug-in that fails, and then serves with its own layers, which on CPUs
    corrupt base requests beside adapters.
    Raises: EngineSeamError: a worker without them.
    """
    try:
        answers: list[dict[str, Any]] = await engine.collective_rpc("rora_status")
    except Exception as error:  # a stock worker does not know the method
        raise EngineSeamError(
            "the engine started without rora-serve's layers (a stock worker answered); "
            "install rora-serve in the environment that runs vLLM"
        ) from error
    if not all(answer["active"] and answer["num_layers"] for answer in answers):
        raise EngineSeamError(f"the engine's adapter layers are not in place: {answers}")
    problems = {answer["why_not_replayed"] for answer in answers} - {""}
    if problems:
        return f", decoding layer by layer ({'; '.join(problems)})"
    return ", decoding by whole steps"
