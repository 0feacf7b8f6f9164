"""Settings -> base -> runner -> engine. The only module of the upper half that loads torch, and not at import."""

import logging
from dataclasses import replace
from typing import Any

from onebase.base_fetch import Progress, fetch, is_hub_id
from onebase.bases import EMBEDDED_ID, BaseSpec, resolve_base
from onebase.errors import BaseModelError, ModelNotFound
from onebase.serving_note import ServerNote
from onebase.tokenizer import TextTokenizer
from onebase_server.api.backend import Backend
from onebase_server.device_budget import Needs, plan_memory
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.engine import Engine
from onebase_server.engine.grammar_llguidance import LlguidanceBackend
from onebase_server.engine.intake import context_limit
from onebase_server.engine.runner import Runner
from onebase_server.memory import free_memory
from onebase_server.renderers import Renderers, read_chat_template
from onebase_server.settings import Settings
from onebase_server.sizing import PAGE_SIZE, choose_kv_tokens, pages_for

logger = logging.getLogger(__name__)


def load_backend(settings: Settings) -> Backend:
    """Takes seconds to minutes. Raises OnebaseError with words for the operator."""
    if settings.device.startswith("cuda"):
        import torch

        pick_device(settings.device, torch.cuda.device_count())  # now, and not after a base was fetched for it
    note = ServerNote.open(settings.home.serving)  # before all else: a training process waits for the base then
    try:
        spec = find_base(settings)
        runner, tokenizer, shared = load_runner(settings, spec)
        backend = start_backend(settings, spec, runner, tokenizer, note)
    except BaseException:
        note.close()
        raise
    note.ready(shared)
    return backend


def find_base(settings: Settings) -> BaseSpec:
    """The base that the settings name, fetched first if it is a hub id; none named: the embedded one."""
    wanted = settings.base or EMBEDDED_ID
    try:
        return resolve_base(settings.home, wanted)
    except ModelNotFound as error:
        if wanted.lower() == EMBEDDED_ID.lower() or is_hub_id(wanted):
            return fetch(settings.home, wanted, progress=log_stages(wanted))
        near = f" Did you mean {', '.join(error.near)}?" if error.near else ""
        raise BaseModelError(
            f"no base '{wanted}' under {settings.home.bases}: name a folder, a hub id (organisation/model) or one of "
            f"`onebase base ls`.{near}",
            param="base",
        ) from error


def log_stages(name: str) -> Progress:
    """One log line for each new stage of a fetch."""
    last = ""

    def note(stage: str, _fraction: float) -> None:
        nonlocal last
        if stage != last:
            logger.info("%s: %s", name, stage)
        last = stage

    return note


def start_backend(
    settings: Settings, spec: BaseSpec, runner: Runner, tokenizer: TextTokenizer, note: ServerNote | None = None
) -> Backend:
    """The engine over a runner, running; it owns `note`. Torch-free: tests hand in a runner of their own."""
    config = EngineConfig(
        max_queued=settings.queue_limit,
        host_budget_bytes=settings.adapter_memory_mb * 1_000_000,
        share_prefixes=settings.share_prefixes,
    )
    engine = Engine(runner, tokenizer, config, grammar=LlguidanceBackend(tokenizer), note=note)
    renderers = Renderers(tokenizer, read_chat_template(spec.path))
    backend = Backend(
        engine=engine,
        tokenizer=tokenizer,
        base=spec,
        base_format=renderers.own_format(settings.base_format),
        renderer=renderers,
        max_context=context_limit(runner.limits),
        created=int((spec.path / "config.json").stat().st_mtime),
    )
    engine.start()
    return backend


def load_runner(settings: Settings, spec: BaseSpec) -> tuple[Runner, TextTokenizer, dict[str, Any]]:
    """Weights on the device, and all memory that steps will need. Last: where training processes find the weights."""
    import torch

    from onebase.base_model import load_base
    from onebase_server.engine.runner_torch import RunnerConfig

    device = torch.device(pick_device(settings.device, torch.cuda.device_count()))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)  # of this thread; the runner binds the engine's
    base = load_base(spec, device, compute_dtype="float32" if settings.dtype == "float32" else "bfloat16")
    max_context = min(settings.max_context or spec.context_length, spec.context_length)
    config = RunnerConfig(
        page_size=PAGE_SIZE,
        num_slots=settings.adapter_slots,
        max_lora_rank=settings.max_lora_rank,
        max_batch_tokens=max(settings.max_step_tokens, settings.max_sequences),
        max_batch_sequences=settings.max_sequences,
        max_context=max_context,
    )
    runner, shared = (make_cuda_runner if device.type == "cuda" else make_cpu_runner)(base, config, settings)
    tokens = runner.limits.num_pages * PAGE_SIZE
    logger.info("%s on %s: %d tokens of KV cache, context %d", spec.id, device, tokens, max_context)
    if tokens < max_context:
        logger.warning("the KV cache holds requests of up to %d tokens, not the context's %d", tokens, max_context)
    return runner, base.tokenizer, shared


def make_cuda_runner(base: Any, config: Any, settings: Settings) -> tuple[Runner, dict[str, Any]]:
    """Over our kernels where they fit, else bitsandbytes' or plain torch's, and KV pages from what memory is left."""
    import torch

    from onebase_server.engine.build_cuda import build_cuda_runner
    from onebase_server.engine.share_weights import describe_cuda
    from onebase_server.kernels.torch_ops import TorchKernels

    def num_pages(free: int, has_graphs: bool) -> int:
        needs = Needs(
            config=base.spec.config,
            element_bytes=base.compute_dtype.itemsize,
            max_context=config.max_context,
            max_sequences=config.max_batch_sequences,
            max_step_tokens=config.max_batch_tokens,
            adapter_slots=config.num_slots,
            max_lora_rank=config.max_lora_rank,
            has_graphs=has_graphs,
            kv_tokens=settings.kv_tokens,
        )
        budget = plan_memory(needs, free)
        for line in budget.lines(torch.cuda.memory_allocated(base.device)):
            logger.info("device memory, planned: %s", line)
        return pages_for(budget.kv_tokens)

    runner = build_cuda_runner(
        base,
        config,
        cache_dir=settings.home.cache,
        kernels=TorchKernels() if settings.dtype == "float32" else None,
        num_pages=num_pages,
        release=True,
    )
    return runner, describe_cuda(runner.weights, base.spec.identity)


def make_cpu_runner(base: Any, config: Any, settings: Settings) -> tuple[Runner, dict[str, Any]]:
    """Over the C++ kernels where they can be built, else plain torch."""
    from onebase_server.engine.runner_torch import build_runner
    from onebase_server.engine.share_weights import share_on_file
    from onebase_server.kernels.cpu_build import load_library
    from onebase_server.kernels.cpu_ops import CpuKernels
    from onebase_server.kernels.torch_ops import TorchKernels

    tokens = settings.kv_tokens or choose_kv_tokens(
        base.spec.config,
        element_bytes=base.compute_dtype.itemsize,
        free_bytes=free_memory(),
        max_context=config.max_context,
        max_sequences=config.max_batch_sequences,
    )
    library = load_library(settings.home.cache)
    kernels: Any = TorchKernels() if library is None else CpuKernels(library, base.compute_dtype)
    shared: dict[str, Any] = {}

    def place(weights: Any) -> Any:
        nonlocal shared
        placed, shared = share_on_file(weights, kernels, base.spec.identity, settings.home.cache)
        return placed

    return build_runner(base, kernels, replace(config, num_pages=pages_for(tokens)), place=place), shared


def pick_device(wanted: str, num_cuda: int) -> str:
    """`cpu`, `cuda` or `cuda:N`. Raises BaseModelError for what is none of them, or not there."""
    if wanted == "auto":
        return "cuda" if num_cuda else "cpu"
    kind, colon, number = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
        raise BaseModelError(f"device {wanted}: ONEBASE_DEVICE is auto, cpu, cuda or cuda:N", param="device")
    if kind == "cuda" and not num_cuda:
        raise BaseModelError(f"device {wanted}: this machine has no CUDA device that torch can use", param="device")
    if number and int(number) >= num_cuda:
        raise BaseModelError(f"device {wanted}: the last one of this machine is cuda:{num_cuda - 1}", param="device")
    return wanted
