"""Steps as CUDA graphs: static buffers, one graph a (tokens, LoRA work, context) bucket, captured at the start or when
first met; graph_keys.py says which.

A graph sees addresses only, so everything that changes between replays (tokens, positions, pages, adapters' rows) lies
in one buffer that a single copy fills. Grids are sized by the buckets; kernels leave at once beyond the true sizes.
A row is one token. In a decode step it is a sequence's only one; with prefill it attends by itself to what its sequence
has up to it, so that shapes do not depend on who has how many. Nothing here knows requests or sampling parameters
beyond the greedy choice.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.lru import Lru
from onebase_server.engine.graph_keys import (
    MAX_LORA_GRAPHS,
    Bucket,
    GraphKey,
    base_keys,
    buckets_up_to,
    common_keys,
    key_of,
)
from onebase_server.engine.model_forward import ModelForward
from onebase_server.kernels.cuda_ops import CudaKernels
from onebase_server.kernels.ops import StepMeta


class StepBuffers:
    """The inputs of a step of up to `bucket.tokens` rows and `max_batch` sequences, in one device buffer and its pinned
    twin."""

    def __init__(self, bucket: Bucket, max_batch: int, width: int, device: torch.device) -> None:
        self.bucket = bucket
        rows = bucket.tokens
        self._width, self._tables_at = width, 12 * rows
        count = self._tables_at + min(rows, max_batch) * width
        self._host = torch.zeros(count, dtype=torch.int32, pin_memory=True)
        self._device = torch.zeros(count, dtype=torch.int32, device=device)
        host, self.device_parts = self._split(self._host), self._split(self._device)
        self.kv_slots, self.temperatures, self.uniforms, *ints = (part.numpy() for part in host)
        self.tokens, self.positions, self.context_lens, self.starts, self.ranks, self.seqs, self.tables = ints
        self._next_uniforms = [torch.zeros(rows, dtype=torch.float64, pin_memory=True) for _ in range(2)]
        self.query_starts = torch.arange(rows + 1, dtype=torch.int32, device=device)

    def _split(self, flat: Tensor) -> tuple[Tensor, ...]:
        n = self.bucket.tokens
        slots, temperatures, uniforms, ints = flat[: 2 * n], flat[2 * n : 4 * n], flat[4 * n : 6 * n], flat[6 * n :]
        parts = [ints[i * n : (i + 1) * n] for i in range(6)]
        doubles = temperatures.view(torch.float64), uniforms.view(torch.float64)
        return (slots.view(torch.int64), *doubles, *parts, flat[self._tables_at :].view(-1, self._width))

    def send(self, sequences: int) -> None:
        """Of the tables, only those of so many sequences."""
        used = self._tables_at + sequences * self._width
        self._device[:used].copy_(self._host[:used], non_blocking=True)

    def send_uniforms(self, values: NDArray[np.float64]) -> None:
        """Of the step after the one under way: two pinned buffers in turn, since the last copy may be waiting."""
        self._next_uniforms.reverse()
        pinned = self._next_uniforms[0]
        pinned.numpy()[: len(values)] = values
        self.device_parts[2].copy_(pinned, non_blocking=True)

    def blank(self) -> None:
        """A step of no sequences, on the device."""
        self._device.zero_()
        self.device_parts[0].fill_(-1)

    def meta(self, key: GraphKey) -> StepMeta:
        kv_slots, _, _, _, positions, context_lens, starts, ranks, seqs, tables = self.device_parts
        return StepMeta(
            positions=positions,
            kv_slots=kv_slots,
            query_starts=self.query_starts,
            context_lens=context_lens,
            block_tables=tables,
            token_seqs=seqs,
            lora_starts=starts,
            lora_ranks=ranks,
            has_lora=bool(key.active),
            max_rank=key.max_rank,
            max_query=1,
            max_context=key.max_context,
            is_flat=key.bucket.prefill,
        )


class StepGraphs:
    """All graphs of one model. Engine thread only; one step in flight. `max_prefill`: most tokens of a step with
    prefill that is captured."""

    def __init__(self, forward: ModelForward, max_batch: int, width: int, max_prefill: int) -> None:
        weights = forward.weights
        self._forward = forward
        assert isinstance(forward.kernels, CudaKernels)
        self._kernels = forward.kernels
        self._width = width
        self._max_batch = max_batch
        self._buckets = buckets_up_to(max_batch, max_prefill)
        self._limit = weights.geometry.max_context
        largest = max(bucket.tokens for bucket in self._buckets)
        self.logits = torch.zeros(largest, weights.geometry.vocab, dtype=weights.dtype, device=weights.device)
        """Of the last step's rows."""
        self._chosen = torch.zeros(largest, dtype=torch.int64, device=weights.device)
        self._fetched = [torch.zeros(largest, dtype=torch.int64, pin_memory=True) for _ in range(2)]
        self._side = 0
        self._last: tuple[StepBuffers, GraphKey] | None = None
        self._buffers: dict[Bucket, StepBuffers] = {}
        self._base: dict[GraphKey, torch.cuda.CUDAGraph] = {}
        self._lora: Lru[GraphKey, torch.cuda.CUDAGraph] = Lru(MAX_LORA_GRAPHS)
        self._pool = torch.cuda.graph_pool_handle()

    def check_draws(self) -> bool:
        """Whether the kernel draws what the sampler's own formula draws, on random logits."""
        rows, vocab = 16, self.logits.shape[1]
        device = self.logits.device
        logits = (torch.randn(rows, vocab, device=device) * 3).to(self.logits.dtype)
        temperatures = torch.linspace(0.2, 2, rows, dtype=torch.float64, device=device)
        uniforms = torch.rand(rows, dtype=torch.float64, device=device)
        chosen = torch.zeros(rows, dtype=torch.int64, device=device)
        self._kernels.draw_tokens(logits, temperatures, uniforms, chosen)
        wide = logits.double()
        running = ((wide - wide.amax(-1, keepdim=True)) / temperatures[:, None]).exp().cumsum(-1)
        expected = torch.searchsorted(running, uniforms[:, None] * running[:, -1:], right=True)[:, 0]
        return bool((chosen == expected).sum() >= rows - 1)

    @property
    def num_graphs(self) -> int:
        return len(self._base) + len(self._lora)

    def warm_up(self, draws: tuple[bool, ...], max_rank: int) -> None:
        """Capture all graphs of the bare base and the common ones of adapters up to `max_rank`."""
        for key in base_keys(self._buckets, self._limit, draws):
            self._graph(key)
        for key in common_keys(self._buckets, self._limit, draws, max_rank):
            self._graph(key)

    def bucket(self, tokens: int, *, prefill: bool) -> Bucket | None:
        """The one that a step of so many tokens fits into, if any does."""
        return next((b for b in self._buckets if b.prefill is prefill and b.tokens >= tokens), None)

    def buffers(self, bucket: Bucket) -> StepBuffers:
        """Where the next step of that bucket is to be written."""
        if bucket not in self._buffers:
            self._buffers[bucket] = StepBuffers(bucket, self._max_batch, self._width, self.logits.device)
        return self._buffers[bucket]

    def launch(
        self,
        buffers: StepBuffers,
        sequences: int,
        active: frozenset[str],
        max_rank: int,
        max_context: int,
        *,
        draws: bool,
    ) -> None:
        """Replay the step that lies in `buffers`. Returns at once; `logits` and the choices follow on the stream."""
        key = key_of(buffers.bucket, active, max_rank, max_context, self._limit, draws=draws)
        graph = self._graph(key)
        buffers.send(sequences)
        graph.replay()
        self._last = buffers, key

    def reaches(self, context: int) -> bool:
        """Whether the last graph covers contexts of that length."""
        return self._last is not None and context <= self._last[1].max_context

    def launch_next(self, uniforms: NDArray[np.float64]) -> None:
        """Replay the last step once more, moved on by one token: its choices are the inputs. Pages must suffice.
        `uniforms`: that step's, unused if nothing is drawn."""
        assert self._last is not None
        buffers, key = self._last
        if key.draws:
            buffers.send_uniforms(uniforms)
        chosen = self._chosen[: key.bucket.tokens]
        self._kernels.advance_step(buffers.device_parts[3], chosen, buffers.meta(key))
        self._graph(key).replay()

    def start_fetch(self) -> Tensor:
        """Begin to bring the greedy choices to the host, into one of two buffers in turn."""
        self._side ^= 1
        fetched = self._fetched[self._side]
        fetched.copy_(self._chosen, non_blocking=True)
        return fetched

    def _graph(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        graph = self._lora.get(key) if key.active else self._base.get(key)
        if graph is None:
            graph = self._capture(key)  # it waits for the device, so the one that makes way is not under way
            if key.active:
                self._lora.keep(key, graph)
            else:
                self._base[key] = graph
        return graph

    def _capture(self, key: GraphKey) -> torch.cuda.CUDAGraph:
        buffers = self.buffers(key.bucket)
        meta = buffers.meta(key)
        buffers.blank()  # the run below must not write to pages in use
        self._step(buffers, meta, key)  # compiles and allocates what is not there yet
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(buffers, meta, key)
        return graph

    def _step(self, buffers: StepBuffers, meta: StepMeta, key: GraphKey) -> None:
        _, temperatures, uniforms, tokens, *_ = buffers.device_parts
        logits, chosen = self.logits[: key.bucket.tokens], self._chosen[: key.bucket.tokens]
        hidden = self._forward.hidden_states(tokens, meta, key.active)
        torch.mm(hidden, self._forward.weights.lm_head.T, out=logits)
        if key.draws:
            self._kernels.draw_tokens(logits, temperatures, uniforms, chosen)
        else:
            torch.argmax(logits, -1, out=chosen)
