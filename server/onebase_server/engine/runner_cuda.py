"""`CudaRunner`: `TorchRunner` on CUDA, with steps as graph replays and `launch` apart from `collect`.

Steps with much prefill run without a graph, on the same stream. Greedy choices are made inside the graph and come back
in one copy; other sampling runs on the logits that the graph left. It must not know scheduling, text or HTTP.
"""

import logging
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.adapter import BaseIdentity
from onebase_server.engine.cuda_forward import CudaForward, covers
from onebase_server.engine.cuda_graphs import StepBuffers, StepGraphs
from onebase_server.engine.graph_keys import PREFILLS, Bucket
from onebase_server.engine.logit_edits import has_edits
from onebase_server.engine.model_forward import ModelForward
from onebase_server.engine.run_ahead import RunAhead
from onebase_server.engine.runner import HostAdapter, Int32, StepBatch, StepResult
from onebase_server.engine.runner_torch import RunnerConfig, TorchRunner
from onebase_server.engine.sampler import is_greedy, is_truncated, uniforms
from onebase_server.engine.weights import ModelWeights
from onebase_server.kernels.cuda_ops import CudaKernels
from onebase_server.kernels.cuda_variants import MAX_TOKENS

logger = logging.getLogger(__name__)

MOST_READS = 60_000
"""In a graph each token of a prompt reads by itself all that it attends to. Past so many reads of a step, which is 256
new tokens after 100 or 100 after 550, a kernel that shares what is read is faster."""


@dataclass(slots=True)
class Ticket:
    """A started step: either its logits [R, V], to be sampled from, or greedy choices on their way to the host."""

    batch: StepBatch
    done: torch.cuda.Event
    logits: Tensor | None = None
    fetched: Tensor | None = None
    places: Int32 | None = None
    """Where each of the batch's sequences is among the fetched choices; None: in order."""


class CudaRunner(TorchRunner):
    """Implements `OverlappingRunner`. `weights` must have been read with the same kernels."""

    def __init__(
        self,
        weights: ModelWeights,
        kernels: CudaKernels,
        config: RunnerConfig,
        *,
        eos_token_ids: frozenset[int],
        identity: BaseIdentity | None = None,
    ) -> None:
        super().__init__(weights, kernels, config, eos_token_ids=eos_token_ids, identity=identity)
        assert isinstance(self.forward, ModelForward)
        pools = [self.slots.layer(i) for i in range(weights.geometry.layers)]
        if covers(weights, self.cache, pools):
            self.forward = CudaForward(weights, kernels, self.cache, pools)
        width = -(-weights.geometry.max_context // config.page_size)
        with torch.inference_mode():
            most_prefill = self._most_prefill(kernels)
            self._graphs = StepGraphs(self.forward, config.max_batch_sequences, width, most_prefill)
            self._draws_in_graph = self._graphs.check_draws()
            before = torch.cuda.mem_get_info(self.device)[0]
            self._graphs.warm_up((False, True) if self._draws_in_graph else (False,), config.max_lora_rank)
            self.graph_bytes = before - torch.cuda.mem_get_info(self.device)[0]
            """What the graphs captured at the start took, and what their kernels allocated on the way."""
        if not self._draws_in_graph:
            logger.warning("the kernel that draws tokens disagrees with torch here; tokens are drawn by torch")
        self._ahead = RunAhead(config.page_size, weights.geometry.max_context)

    @property
    def num_graphs(self) -> int:
        return self._graphs.num_graphs

    def load_slot(self, slot: int, adapter: HostAdapter) -> None:
        """As the base class; a step started ahead would be followed by one with the rows' old places."""
        moves = self.slots.num_moves
        super().load_slot(slot, adapter)
        if self.slots.num_moves != moves:
            self._ahead.forget()

    def release_state(self, state_id: int) -> None:
        self._ahead.release(state_id)
        super().release_state(state_id)

    def run(self, batch: StepBatch) -> StepResult:
        return self.collect(self.launch(batch))

    @torch.inference_mode()
    def launch(self, batch: StepBatch) -> Ticket:
        """Start a step and return at once."""
        with self.guard.step():
            bucket = self._bucket(batch)
            if bucket is None:
                self._ahead.forget()
                return Ticket(batch, logits=self._launch_chunks(batch), done=_record())
            plain = self._is_plain(batch)
            if bucket.prefill:
                self._ahead.forget()
                logits = self._launch_graph(batch, bucket, plain)
                places = batch.query_starts[1:] - 1
                return Ticket(batch, logits=logits, fetched=self._fetch(plain), places=places, done=_record())
            started = self._ahead.take(batch) if plain else None
            if started is None:
                logits = self._launch_graph(batch, bucket, plain)
                ticket = Ticket(batch, logits=logits, fetched=self._fetch(plain), done=_record())
            else:
                ticket = Ticket(batch, fetched=started.fetched, places=started.places, done=started.done)
            if self._ahead.may_start(batch, plain, started) and self._graphs.reaches(int(batch.context_lens.max()) + 1):
                self._graphs.launch_next(_uniforms(batch, ahead=1))
                self._ahead.put(batch, self._graphs.start_fetch(), _record())
            return ticket

    @torch.inference_mode()
    def collect(self, ticket: Ticket) -> StepResult:
        """Wait for the sampled tokens of a started step."""
        with self.guard.step():
            batch, rows = ticket.batch, ticket.batch.rows
            if ticket.logits is not None:
                return self.choose(ticket.logits.float(), batch)
            assert ticket.fetched is not None
            ticket.done.synchronize()
            chosen = ticket.fetched.numpy().astype(np.int32)
            chosen = chosen[: len(batch.slots)] if ticket.places is None else chosen[ticket.places]
            self._ahead.note(batch, chosen)
            chosen = chosen[batch.sample_seqs]
            nothing: list[None] = [None] * len(rows)
            return StepResult(chosen, np.zeros(len(rows), dtype=np.float32), [*nothing], [*nothing])

    def _most_prefill(self, kernels: CudaKernels) -> int:
        """Most tokens of a step with prefill whose shapes suit a graph: none where attention is the torch twin's, and
        past MAX_TOKENS only where no weight is unpacked for a step."""
        g = self.weights.geometry
        if not kernels.takes_flat(g.head, g.heads // g.kv_heads, self.cache.page_size, self.weights.dtype):
            return 0
        return PREFILLS[-1] if isinstance(self.forward, CudaForward) else MAX_TOKENS

    def _bucket(self, batch: StepBatch) -> Bucket | None:
        """Which graphs suit the step, if any."""
        tokens, queries = len(batch.token_ids), np.diff(batch.query_starts)
        if len(batch.scored):
            return None
        if tokens == len(batch.slots):
            return self._graphs.bucket(tokens, prefill=False)
        reads = int((batch.positions + 1)[np.repeat(queries > 1, queries)].sum())
        return self._graphs.bucket(tokens, prefill=True) if reads <= MOST_READS else None

    def _fetch(self, plain: bool) -> Tensor | None:
        return self._graphs.start_fetch() if plain else None

    def _is_plain(self, batch: StepBatch) -> bool:
        """The graph chooses every token: the most likely one or, with a temperature alone, a drawn one. One row a
        sequence, unless all are greedy: answers that fork from one prompt draw apart from the same logits."""
        rows = batch.rows
        if any(row.sampling.top_logprobs is not None or has_edits(row) for row in rows):
            return False
        drawn = [row for row in rows if not is_greedy(row.sampling)]
        if not drawn:
            return True
        apart = len(set(batch.sample_seqs.tolist())) == len(rows)
        return self._draws_in_graph and apart and not any(is_truncated(row.sampling) for row in drawn)

    def _launch_graph(self, batch: StepBatch, bucket: Bucket, plain: bool) -> Tensor | None:
        rows, sequences, page = len(batch.token_ids), len(batch.slots), self.config.page_size
        buffers = self._graphs.buffers(bucket)
        seqs = np.repeat(np.arange(sequences), np.diff(batch.query_starts))
        starts, ranks = self._slot_rows(batch.slots)
        pages = batch.block_tables[seqs, batch.positions // page].astype(np.int64)
        buffers.kv_slots[:rows] = pages * page + batch.positions % page
        buffers.tokens[:rows] = batch.token_ids
        buffers.positions[:rows] = batch.positions
        buffers.context_lens[:rows] = batch.positions + 1
        buffers.starts[:rows] = starts[seqs]
        buffers.ranks[:rows] = ranks[seqs]
        buffers.seqs[:rows] = seqs
        buffers.tables[:sequences, : batch.block_tables.shape[1]] = batch.block_tables
        buffers.kv_slots[rows:] = -1
        for padded in (buffers.tokens, buffers.positions, buffers.context_lens, buffers.ranks):
            padded[rows:] = 0
        sampled = batch.query_starts[1:][batch.sample_seqs] - 1
        draws = plain and _write_draws(buffers, batch, sampled)
        active = self.slots.active(set(batch.slots.tolist()))
        longest = int(batch.context_lens.max())
        self._graphs.launch(buffers, sequences, active, int(ranks.max(initial=0)), longest, draws=draws)
        if plain:
            return None
        return self._graphs.logits[self._put(sampled.astype(np.int64))]

    def _launch_chunks(self, batch: StepBatch) -> Tensor:
        meta, active = self.step_meta(batch)
        return self.forward(self._put(batch.token_ids), meta, active, self._put(self.logit_places(batch)))


def _write_draws(buffers: StepBuffers, batch: StepBatch, sampled: Int32) -> bool:
    """Temperatures (0: the most likely) and uniforms of the rows that are `sampled`; False if all are 0."""
    drawn = [0.0 if is_greedy(row.sampling) else row.sampling.temperature for row in batch.rows]
    if not any(drawn):
        return False
    buffers.temperatures[:] = 0
    buffers.temperatures[sampled] = drawn
    buffers.uniforms[sampled] = uniforms(batch.rows, 0)
    return True


def _uniforms(batch: StepBatch, ahead: int) -> NDArray[np.float64]:
    """Of each sequence, for the step that many after this one."""
    values = np.zeros(len(batch.slots))
    values[batch.sample_seqs] = uniforms(batch.rows, ahead)
    return values


def _record() -> torch.cuda.Event:
    return cast(torch.cuda.Event, torch.cuda.current_stream().record_event())
