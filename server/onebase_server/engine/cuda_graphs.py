"""Decode steps as CUDA graphs: static buffers, one graph a (batch, LoRA work, context) bucket, captured when first met.

A graph sees addresses only, so everything that changes between replays (tokens, positions, pages, adapters' rows) lies
in one buffer that a single copy fills. Grids are sized by the buckets; kernels leave at once beyond the true sizes.
Nothing here knows requests or sampling parameters beyond the greedy choice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebase_server.engine.model_forward import ModelForward
from onebase_server.kernels.cuda_ops import CudaKernels
from onebase_server.kernels.ops import StepMeta

BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Sizes at which graphs are captured: a step is padded to the next one. Above the last, steps run without a graph."""
RANKS = (8, 16, 32, 64, 128, 256)
SHORT_CONTEXT = 512
"""Steps in which no sequence is longer use graphs whose attention is not split for the longest context."""


@dataclass(frozen=True, slots=True)
class GraphKey:
    batch: int
    active: frozenset[str]
    """Projections with LoRA work."""
    max_rank: int
    max_context: int


class StepBuffers:
    """The inputs of a decode step of up to `batch` sequences, in one device buffer and its pinned twin."""

    def __init__(self, batch: int, width: int, device: torch.device) -> None:
        self.batch = batch
        count = 2 * batch + 5 * batch + batch * width
        self._host = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(count, dtype=torch.int32, device=device)
        host, on_device = self._split(self._host, width), self._split(self._device, width)
        self.kv_slots, self.tokens, self.positions, self.context_lens, self.starts, self.ranks, self.tables = (
            part.numpy() for part in host
        )
        self.device_parts = on_device
        self.query_starts = torch.arange(batch + 1, dtype=torch.int32, device=device)

    def _split(self, flat: Tensor, width: int) -> tuple[Tensor, ...]:
        n = self.batch
        ints = flat[2 * n :]
        parts = [ints[i * n : (i + 1) * n] for i in range(5)]
        return (flat[: 2 * n].view(torch.int64), *parts, ints[5 * n :].view(n, width))

    def send(self) -> None:
        self._device.copy_(self._host, non_blocking=True)

    def blank(self) -> None:
        """A step of no sequences, on the device."""
        self._device.zero_()
        self.device_parts[0].fill_(-1)

    def meta(self, key: GraphKey) -> StepMeta:
        kv_slots, _, positions, context_lens, starts, ranks, tables = self.device_parts
        return StepMeta(
            positions=positions,
            kv_slots=kv_slots,
            query_starts=self.query_starts,
            context_lens=context_lens,
            block_tables=tables,
            token_seqs=self.query_starts[:-1],
            lora_starts=starts,
            lora_ranks=ranks,
            has_lora=bool(key.active),
            max_rank=key.max_rank,
            max_query=1,
            max_context=key.max_context,
        )


class DecodeGraphs:
    """All graphs of one model. Engine thread only; one step in flight."""

    def __init__(self, forward: ModelForward, max_batch: int, width: int) -> None:
        weights = forward.weights
        self._forward = forward
        assert isinstance(forward.kernels, CudaKernels)
        self._kernels = forward.kernels
        self._width = width
        self._batches = [b for b in BATCHES if b < max_batch] + [min(max_batch, BATCHES[-1])]
        self._limit = weights.geometry.max_context
        largest = self._batches[-1]
        self.logits = torch.zeros(largest, weights.geometry.vocab, dtype=weights.dtype, device=weights.device)
        """Of the last step; rows in the order of its sequences."""
        self._chosen = torch.zeros(largest, dtype=torch.int64, device=weights.device)
        self._fetched = [torch.zeros(largest, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._side = 0
        self._last: tuple[StepBuffers, GraphKey] | None = None
        self._buffers: dict[int, StepBuffers] = {}
        self._graphs: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def largest(self) -> int:
        return self._batches[-1]

    def warm_up(self) -> None:
        """Capture the bare base's graphs, the largest first (its memory then serves the others)."""
        for batch in reversed(self._batches):
            for context in sorted({min(SHORT_CONTEXT, self._limit), self._limit}, reverse=True):
                self._graph(GraphKey(batch, frozenset(), 0, context))

    def buffers(self, batch: int) -> StepBuffers:
        """Where the next step of that many sequences is to be written."""
        bucket = next(b for b in self._batches if b >= batch)
        if bucket not in self._buffers:
            self._buffers[bucket] = StepBuffers(bucket, self._width, self.logits.device)
        return self._buffers[bucket]

    def launch(self, buffers: StepBuffers, active: frozenset[str], max_rank: int, max_context: int) -> None:
        """Replay the step that lies in `buffers`. Returns at once; `logits` and the choices follow on the stream."""
        short = min(SHORT_CONTEXT, self._limit)
        rank = next((r for r in RANKS if r >= max_rank), max_rank) if active else 0
        context = short if max_context <= short else self._limit
        key = GraphKey(buffers.batch, active, rank, context)
        graph = self._graph(key)
        buffers.send()
        graph.replay()
        self._last = buffers, key

    def reaches(self, context: int) -> bool:
        """Whether the last graph covers contexts of that length."""
        return self._last is not None and context <= self._last[1].max_context

    def launch_next(self) -> None:
        """Replay the last step once more, moved on by one token: its choices are the inputs. Pages must suffice."""
        assert self._last is not None
        buffers, key = self._last
        chosen = self._chosen[: key.batch]
        self._kernels.advance_step(buffers.device_parts[1], chosen, buffers.meta(key))
        self._graphs[key].replay()

    def start_fetch(self) -> Tensor:
        """Begin to bring the greedy choices to the host, into one of two buffers in turn."""
        self._side ^= 1
        fetched = self._fetched[self._side]
        fetched.copy_(self._chosen, non_blocking=True)
        return fetched

    def _graph(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        if key not in self._graphs:
            self._graphs[key] = self._capture(key)
        return self._graphs[key]

    def _capture(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        buffers = self.buffers(key.batch)
        meta = buffers.meta(key)
        tokens = buffers.device_parts[1]
        buffers.blank()  # the run below must not write to pages in use
        self._step(tokens, meta, key)  # compiles and allocates what is not there yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(tokens, meta, key)
        return graph

    def _step(self, tokens: Tensor, meta: StepMeta, key: GraphKey) -> None:
        logits, chosen = self.logits[: key.batch], self._chosen[: key.batch]
        hidden = self._forward.hidden_states(tokens, meta, key.active)
        torch.mm(hidden, self._forward.weights.lm_head.T, out=logits)
        torch.argmax(logits, -1, out=chosen)
