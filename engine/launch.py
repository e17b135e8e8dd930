"""The only place that builds and wires both planes, and where every "auto" of the configuration becomes a value.

Importing it is cheap; torch and the model code load inside `build_core`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from engine import launch_calibration, launch_pooling, logs
from engine.adapters import Adapters
from engine.config import Config
from engine.control import Payload
from engine.errors import ConfigError
from engine.mimir import MODELS, model_path
from engine.resources import check_weights_fit, num_cores, size_cache
from engine.scheduling.adapters import AdapterTable
from engine.types import AdapterInfo, ModelInfo

if TYPE_CHECKING:
    import torch

    from engine.compression.artefacts import Artefacts
    from engine.compression.resolver import Policies
    from engine.constraints.vocabulary import Vocabulary
    from engine.core import EngineCore
    from engine.execution.adapters import RowAdapters
    from engine.execution.cuda_graphs import DecodeGraphs
    from engine.execution.runner import ModelRunner
    from engine.models.batch import KVCache, Model
    from engine.models.pooling import Pooler
    from engine.scheduling.pressure import Pressure
    from engine.scheduling.scheduler import Scheduler
    from engine.speculation.allowance import Budget

logger = logging.getLogger(__name__)


# phase ("loading", "warming"), detail, share done in [0, 1]
Progress = Callable[[str, str, float], None]


def resolve_model_path(name: str) -> Path:
    """A bundled model's name or a folder. Raises ConfigError with the remedy when there is no model."""
    if name in MODELS:
        return model_path(name)
    path = Path(name)
    if not path.is_dir():
        raise ConfigError(
            f"model {name!r} is not a folder; give a folder with config.json and *.safetensors, or one of the bundled "
            f"models: {', '.join(MODELS)}"
        )
    if not (path / "config.json").is_file():
        raise ConfigError(f"the model folder {name!r} has no config.json; is it the checkpoint's top folder?")
    return path


def build_core(
    config: Config, progress: Progress = lambda phase, detail, share: None, *, has_yardsticks: bool = False
) -> tuple[EngineCore, ModelInfo]:
    """Loads the model, sizes the cache and wires scheduler and runner. Raises ConfigError.

    has_yardsticks   requests may name cache policies that are for measurements only
    """
    _check_import_name()
    import kernels.backend
    from engine.models import load_model

    path = resolve_model_path(config.model.model)
    device = resolve_device(config.model.device)
    _set_threads(config.runtime.threads)
    if config.runtime.kernel_backend != "auto":
        kernels.backend.use(config.runtime.kernel_backend)
    check_weights_fit(path, device, config)
    with tqdm(desc="weights", unit="B", unit_scale=True, disable=None, leave=False) as bar:  # None: on terminals only

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            progress("loading", "weights", done / max(total, 1))

        report(0, 0)
        if launch_pooling.is_encoder(path):
            return launch_pooling.build_encoder(path, config, device, report)
        model = load_model(
            path,
            device=device,
            dtype=config.model.dtype,
            quantization=config.model.quantization,
            deterministic=config.runtime.deterministic,
            load_format=config.runtime.load_format,
            kind=config.model.load_adapter,
            progress=report,
            seed=config.runtime.seed,
            max_model_len=config.model.max_model_len,
        )
    progress("warming", "kernels", 0.0)
    pooler = launch_pooling.decoder_pooler(path, config, device)
    core, info = wire(
        model,
        config,
        device,
        _vocabulary(config, path, model),
        pooler,
        artefacts=launch_calibration.find_artefacts(config, path),
        has_yardsticks=has_yardsticks,
        progress=progress,
    )
    progress("warming", "kernels", 1.0)
    return core, info


def wire(
    model: Model,
    config: Config,
    device: torch.device,
    vocabulary: Vocabulary | None = None,
    pooler: Pooler | None = None,
    *,
    artefacts: Artefacts | None = None,
    has_yardsticks: bool = False,
    progress: Progress = lambda phase, detail, share: None,
) -> tuple[EngineCore, ModelInfo]:
    """Puts a loaded model, a cache, a runner and a scheduler together, and runs them once.

    vocabulary   what constraints on outputs need; None: requests have none
    pooler       what embeddings and class scores need; None: the model only generates
    artefacts    what cache policies need to know of the model; None: those that do are refused
    has_yardsticks  see `build_core`
    """
    import kernels.backend
    from engine.compression.resolver import Policies
    from engine.core import EngineCore
    from engine.execution import kv_cache
    from engine.execution.constraints import RowConstraints
    from engine.execution.pooling import PoolingRows
    from engine.execution.profiler import StepProfiler
    from engine.execution.rows import RowTable
    from engine.execution.runner import ModelRunner
    from engine.execution.sampler import Sampler
    from engine.launch_speculation import DrafterSource
    from engine.scheduling.scheduler import Scheduler
    from engine.speculation.manager import Speculation
    from engine.speculation.options import SpeculationResolver

    lora = _wire_adapters(model, config, device)
    cache_dtype = _resolve_cache_dtype(config.cache.kv_cache_dtype, device, model)
    guessing = DrafterSource(config, model)  # before the KV cache takes what is left
    size = size_cache(config, model.spec, cache_dtype, device, model.max_model_len)
    if config.cache.max_pinned_blocks > size.num_blocks - 2:
        raise ConfigError(
            f"max_pinned_blocks is {config.cache.max_pinned_blocks}, but the pool has {size.num_blocks} blocks and "
            "requests need some; lower it"
        )
    block_size, num_rows = config.cache.block_size, config.scheduler.max_num_seqs
    cache = kv_cache.allocate(model.spec, size.num_blocks, block_size, cache_dtype, device)
    graphs = _decode_graphs(config, model, cache, size.max_model_len)
    runner = ModelRunner(
        model,
        cache,
        Sampler(model.logits_size, num_rows, device, model.eos_token_ids),
        RowTable(num_rows, size.max_model_len, block_size, device),
        RowConstraints(vocabulary, model.logits_size, num_rows, device, jumps=config.runtime.jump_ahead),
        device,
        adapters=lora.rows,
        pooling=None if pooler is None else PoolingRows(pooler),
        graphs=graphs,
    )
    _warm_up(runner, size.max_model_len, block_size)
    if graphs is not None:
        graphs.record_all(lambda share: progress("warming", "graphs", share))
    policies = Policies(config.cache, model.spec, cache_dtype, artefacts, has_yardsticks, model.shows_hidden)
    scheduler = Scheduler(
        config.scheduler,
        config.cache,
        num_blocks=size.num_blocks,
        max_model_len=size.max_model_len,
        eos_token_ids=model.eos_token_ids,
        model_name=config.model.model,
        adapters=lora.table,
        policies=policies,
        pressure=_pressure(config, policies),
        block_bytes=block_size * kv_cache.bytes_per_token(model.spec, cache_dtype),
        speculation=SpeculationResolver(config.speculation, guessing.names),
    )
    info = ModelInfo(
        architecture=model.architecture,
        dtype=model.dtype_name,
        device=str(device),
        vocab_size=model.vocab_size,
        logits_size=model.logits_size,
        max_model_len=size.max_model_len,
        num_layers=model.spec.num_layers,
        block_size=block_size,
        num_blocks=size.num_blocks,
        max_pinned_blocks=config.cache.max_pinned_blocks,
        kv_cache_bytes=size.num_blocks * block_size * kv_cache.bytes_per_token(model.spec, cache_dtype),
        weight_bytes=model.weight_bytes,
        eos_token_ids=list(model.eos_token_ids),
        kernels={op: kernels.backend.select(op, device) for op in kernels.backend.operations()},
        generation_defaults=dict(model.generation_defaults) if config.model.generation_config == "auto" else {},
        adapters=lora.loaded,
        can_generate=pooler is None or pooler.config.has_language_head,
        pooling=None if pooler is None else pooler.info,
    )
    speculation = Speculation(guessing.make, _speculation_budget(config, scheduler), model.vocab_size)
    overlaps = config.runtime.overlap == "on" or (config.runtime.overlap == "auto" and device.type == "cuda")
    core = EngineCore(scheduler, runner, speculation, overlaps=overlaps)
    scheduler.cache_control.offer(core.controls)
    StepProfiler(core, config.runtime.profile_folder).offer(core.controls)
    core.controls.add("log_level", _set_log_level)
    if lora.adapters is not None:
        lora.adapters.offer(core.controls)
    return core, info


def _decode_graphs(config: Config, model: Model, cache: KVCache, max_model_len: int) -> DecodeGraphs | None:
    """What replays steps that only decode, if anything. Raises ConfigError."""
    from engine.execution.cuda_graphs import DecodeGraphs, cuda_graph_maker
    from engine.models.decoder import Decoder

    choice, device = config.runtime.cuda_graphs, model.device
    if choice == "off" or (choice == "auto" and not (device.type == "cuda" and isinstance(model, Decoder))):
        return None
    if device.type != "cuda":
        raise ConfigError(f"cuda_graphs is on, but the model runs on {device}; use auto")
    return DecodeGraphs(
        lambda batch: model.forward(batch, cache),
        cuda_graph_maker(),
        max_rows=config.scheduler.max_num_seqs,
        max_blocks=-(-max_model_len // config.cache.block_size) + 1,
        num_kv_heads=model.spec.num_kv_heads,
        device=device,
        must_succeed=choice == "on",
    )


def _pressure(config: Config, policies: Policies) -> Pressure | None:
    """What shrinks caches when memory runs short, if anything. Raises ConfigError."""
    from engine.compression.ladder import ladder
    from engine.scheduling.pressure import Pressure

    if not config.cache.pressure_policy:
        return None
    return Pressure(ladder(config.cache.pressure_policy, policies), is_default=policies.default_may_shrink)


def _speculation_budget(config: Config, scheduler: Scheduler) -> Budget:
    from engine.speculation.allowance import FixedBudget
    from engine.speculation.calibration import Calibration
    from engine.speculation.cost import CostTable
    from engine.speculation.load_budget import LoadAwareBudget

    if config.speculation.speculative_budget == "fixed":
        return FixedBudget(config.speculation.speculative_max_rows)
    return LoadAwareBudget(
        CostTable(),
        Calibration(),
        max_rows=config.scheduler.max_num_batched_tokens,
        num_waiting_tokens=lambda: scheduler.roster.queue.num_tokens,
        num_free_slots=lambda: scheduler.cache.num_unclaimed_slots,
    )


@dataclass(frozen=True)
class _Lora:
    """The parts that serve low-rank adapters; without them there is an empty table."""

    table: AdapterTable
    rows: RowAdapters | None = None
    adapters: Adapters | None = None
    loaded: list[AdapterInfo] = field(default_factory=list)


def _wire_adapters(model: Model, config: Config, device: torch.device) -> _Lora:
    """Makes room for adapters and loads those of the configuration. Raises ConfigError."""
    given = config.lora
    if not given.enable_lora:
        if given.lora_adapters or given.lora_root:
            raise ConfigError("--lora-adapters and --lora-root need --enable-lora")
        return _Lora(AdapterTable())
    from engine.execution.adapters import RowAdapters
    from engine.models.decoder import Decoder

    if not isinstance(model, Decoder):
        raise ConfigError(f"--enable-lora needs a native decoder; {model.architecture} does not run through one")
    table = AdapterTable(given.max_lora_adapters, on_free=lambda index: rows.drop(index))
    room = model.enable_adapters(table.num_indices - 1)
    rows = RowAdapters(room, config.scheduler.max_num_seqs, given.max_lora_rank, device)
    adapters = Adapters(given, table, rows)
    return _Lora(table, rows, adapters, adapters.load_at_start())


def _vocabulary(config: Config, path: Path, model: Model) -> Vocabulary | None:
    """What structured output needs of the tokenizer. None, told in the log, when it cannot be had of this one."""
    from engine.constraints.vocabulary import Vocabulary
    from engine.text import tokenizer_files

    try:
        files = tokenizer_files.read(Path(config.model.tokenizer or path))
        return Vocabulary(files.definition, model.eos_token_ids, model.logits_size)
    except ConfigError as error:
        logger.warning("%s; requests with constraints on their output are refused", error)
        return None


def _set_log_level(payload: Payload) -> Payload:
    logs.set_level(payload["level"])
    return {}


def _check_import_name() -> None:
    """Another distribution has our import name `kernels`. Raises ConfigError when its files hide ours."""
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        return
    problem = "the distribution 'kernels' is installed here and shares the import name of our kernels"
    remedy = "run `pip uninstall kernels`, then install kvasir-llm again"
    if importlib.util.find_spec("kernels.backend") is None:
        raise ConfigError(f"{problem}, which it hides; {remedy}")
    logger.warning("%s; one may overwrite the other: %s", problem, remedy)


def resolve_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch finds no CUDA device; install a CUDA build of torch or use cpu")
    return torch.device(name)


def _set_threads(threads: int | None) -> None:
    import torch

    torch.set_num_threads(threads or num_cores())


def _resolve_cache_dtype(name: str, device: torch.device, model: Model) -> torch.dtype:
    import torch

    if name != "auto":
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
        if model.dtype not in (torch.float32, dtype):
            raise ConfigError(
                f"kv_cache_dtype is {name!r}, but the model computes in {model.dtype} and its attention reads a cache "
                "of that type only; use auto"
            )
        return dtype
    # on CPU activations are fp32 whatever the weights are: an fp32 cache keeps the answers those of the plain model
    return torch.float32 if device.type == "cpu" else model.dtype


def _warm_up(runner: ModelRunner, max_model_len: int, block_size: int) -> None:
    """One prompt step and one decode step: first-call costs are paid before ready, and a broken model shows."""
    from engine.scheduling.plan import Chunk, NewRow, StepPlan
    from engine.types import SamplingParams

    prompt = [1] * min(2, max_model_len - 1)
    blocks = tuple(range(1, 2 + len(prompt) // block_size))  # the null block is not written
    num_first = -(-len(prompt) // block_size)
    new = NewRow(
        row=0,
        request_id="warm-up",
        choice=0,
        token_ids=prompt,
        num_prompt_tokens=len(prompt),
        sampling=SamplingParams(temperature=0.0),
        block_ids=(),
        num_computed=0,
    )
    first = Chunk(0, 0, len(prompt), blocks[:num_first], is_sampling=True, output_index=0)
    second = Chunk(0, len(prompt), 1, blocks[num_first:], is_sampling=True, output_index=1)
    for plan in (StepPlan(chunks=(first,), new_rows=(new,)), StepPlan(chunks=(second,)), StepPlan(freed_rows=(0,))):
        errors = [chunk.error for chunk in runner.execute(plan).chunks if chunk.error]
        if errors:
            raise ConfigError(f"the model fails on a first short prompt ({errors[0]}); are the weights complete?")
