"""`TorchRunner`: the real device behind the `Runner` protocol. Weights, pages, slots, one forward and one sampler.

It turns a step's numpy arrays into device tensors once, runs the forward, samples, and hands numpy back. It must not
know scheduling, residency policy, text or HTTP.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.adapter import BaseIdentity
from onebase_server.engine.cpu_choose import cpu_chooser
from onebase_server.engine.cpu_forward import CpuForward, covers
from onebase_server.engine.device_guard import DeviceGuard
from onebase_server.engine.host_adapter import PackedAdapter, TorchHostAdapter, layout_of
from onebase_server.engine.lora_slots import LoraSlots
from onebase_server.engine.model_forward import KVCache, ModelForward
from onebase_server.engine.put import put
from onebase_server.engine.runner import HostAdapter, RunnerLimits, StepBatch, StepResult
from onebase_server.engine.sampler import Sampler, score
from onebase_server.engine.slot_loader import make_loader
from onebase_server.engine.types import AdapterRef
from onebase_server.engine.weights import ModelWeights, read_weights
from onebase_server.kernels.cpu_ops import CpuKernels
from onebase_server.kernels.ops import Kernels, StepMeta

Forward = Callable[[Tensor, StepMeta, frozenset[str], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RunnerConfig:
    """What a runner is built for. Memory: `num_pages` and `num_slots * max_lora_rank` rows are allocated at once."""

    page_size: int = 16
    num_pages: int = 2048
    num_slots: int = 16
    max_lora_rank: int = 64
    lora_rows: int | None = None
    """Rank rows of the pools; None: num_slots * max_lora_rank, which always fits."""
    max_batch_tokens: int = 512
    max_batch_sequences: int = 64
    max_context: int | None = None
    pinned_bytes: int | None = None
    """CUDA: host memory pinned at the start for adapters' files; None: for as many as the slots hold, 1 GiB at most."""


class TorchRunner:
    """Implements `Runner` on any torch device."""

    def __init__(
        self,
        weights: ModelWeights,
        kernels: Kernels,
        config: RunnerConfig,
        *,
        eos_token_ids: frozenset[int],
        identity: BaseIdentity | None = None,
    ) -> None:
        self.weights = weights
        self.config = config
        self.identity = identity
        self.device = weights.device
        self.guard = DeviceGuard(weights.device)
        self.cache = KVCache(weights, config.num_pages, config.page_size)
        rows = config.lora_rows or config.num_slots * config.max_lora_rank
        self.slots = LoraSlots(weights, rows)
        self.forward: Forward = _forward(weights, kernels, self.cache, self.slots)
        choose = cpu_chooser(kernels) if isinstance(kernels, CpuKernels) else None
        self.sampler = Sampler(weights.geometry.vocab, self.device, eos_token_ids, choose)
        self._loader = make_loader(self.slots, layout_of(weights), identity, self.device, config)
        self._limits = RunnerLimits(
            vocab_size=weights.geometry.vocab,
            max_context=weights.geometry.max_context,
            page_size=config.page_size,
            num_pages=config.num_pages,
            num_slots=config.num_slots,
            max_batch_tokens=config.max_batch_tokens,
            max_batch_sequences=config.max_batch_sequences,
            eos_token_ids=eos_token_ids,
        )

    @property
    def limits(self) -> RunnerLimits:
        return self._limits

    def read_adapter(self, ref: AdapterRef) -> HostAdapter:
        return self._loader.read(ref.path)

    def can_load(self, adapter: HostAdapter) -> bool:
        return self.slots.fits(cast(TorchHostAdapter | PackedAdapter, adapter).rank)

    def load_slot(self, slot: int, adapter: HostAdapter) -> None:
        """CUDA: on a stream of its own, so that decoding goes on; CPU: at once."""
        with self.guard.loading():
            self._loader.load(slot, adapter)

    def slot_ready(self, slot: int) -> bool:
        with self.guard.loading():
            return self._loader.is_ready(slot)

    def clear_slot(self, slot: int) -> None:
        with self.guard.loading():
            self._loader.clear(slot)

    def copy_pages(self, pairs: list[tuple[int, int]]) -> None:
        with self.guard.step():
            self.cache.copy_pages(pairs)

    @torch.inference_mode()
    def run(self, batch: StepBatch) -> StepResult:
        with self.guard.step():
            meta, active = self.step_meta(batch)
            token_ids = self._put(batch.token_ids)
            logits = self.forward(token_ids, meta, active, self._put(self.logit_places(batch)))
            return self.choose(logits, batch)

    @staticmethod
    def logit_places(batch: StepBatch) -> NDArray[np.int64]:
        """Tokens whose logits are wanted: the last ones of the sampling sequences, then those that are scored."""
        last = batch.query_starts[1:][batch.sample_seqs] - 1
        return np.concatenate([last, batch.scored]).astype(np.int64)

    def choose(self, logits: Tensor, batch: StepBatch) -> StepResult:
        """Logits fp32 of `logit_places` -> what was sampled, and the scores."""
        count = len(batch.rows)
        result = self.sampler.sample(logits[:count], batch.rows)
        if len(batch.scored):
            result.scores = score(logits[count:], batch.score_targets, batch.score_top)
        return result

    def release_state(self, state_id: int) -> None:
        self.sampler.release(state_id)

    def step_meta(self, batch: StepBatch) -> tuple[StepMeta, frozenset[str]]:
        """Everything that all layers share, computed on the host; and the projections with LoRA work."""
        queries = np.diff(batch.query_starts)
        seqs = np.repeat(np.arange(len(queries), dtype=np.int32), queries)
        page = self.config.page_size
        pages = batch.block_tables[seqs, batch.positions // page].astype(np.int64)
        starts, ranks = self._slot_rows(batch.slots)
        active = self.slots.active(set(batch.slots.tolist()))
        meta = StepMeta(
            positions=self._put(batch.positions),
            kv_slots=self._put(pages * page + batch.positions % page),
            query_starts=self._put(batch.query_starts),
            context_lens=self._put(batch.context_lens),
            block_tables=self._put(batch.block_tables),
            token_seqs=self._put(seqs),
            lora_starts=self._put(starts[seqs]),
            lora_ranks=self._put(ranks[seqs]),
            has_lora=bool(active),
            max_rank=int(ranks.max(initial=0)),
            max_query=int(queries.max(initial=0)),
            max_context=int(batch.context_lens.max(initial=0)),
            total_context=int(batch.context_lens.sum()),
        )
        return meta, active

    def _slot_rows(self, slots: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """First rank row and rank of each sequence's adapter, 0 and 0 for the base."""
        rows = np.zeros((2, len(slots)), dtype=np.int32)
        for i, slot in enumerate(slots.tolist()):
            if slot >= 0:
                owner = self.slots.owner(slot)
                assert owner is not None, f"slot {slot} is empty"
                rows[:, i] = owner.start, owner.rank
        return rows[0], rows[1]

    def _put(self, array: NDArray[Any]) -> Tensor:
        """int32 as the kernels want it; only what is int64 already stays so."""
        return put(array if array.dtype == np.int64 else np.asarray(array, dtype=np.int32), self.device)


def _forward(weights: ModelWeights, kernels: Kernels, cache: KVCache, slots: LoraSlots) -> Forward:
    """The C++ forward where its kernels are in use and fit the model, else the one over single operations."""
    if isinstance(kernels, CpuKernels) and covers(weights, cache.page_size):
        return CpuForward(weights, kernels, cache, slots)
    pools = [slots.layer(i) for i in range(weights.geometry.layers)]
    return ModelForward(weights, kernels, cache, pools)


def build_runner(
    base: Any,
    kernels: Kernels,
    config: RunnerConfig,
    *,
    identity: BaseIdentity | None = None,
    place: Callable[[ModelWeights], ModelWeights] | None = None,
) -> TorchRunner:
    """`base` is a `onebase.base_model.LoadedBase`; its linears are read, never run. `place` may move the weights to
    other memory before anything points at them."""
    weights = read_weights(base.model, kernels, config.max_context)
    if place is not None:
        weights = place(weights)
    return TorchRunner(
        weights,
        kernels,
        config,
        eos_token_ids=base.tokenizer.eos_ids,
        identity=identity if identity is not None else base.spec.identity,
    )
