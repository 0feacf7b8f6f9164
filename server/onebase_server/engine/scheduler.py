"""What runs in the next step: decoding sequences first, then prefill chunks, then newcomers, inside all limits.

A step holds at most `max_batch_tokens` tokens, `max_batch_sequences` sequences and as many adapters as slots. When
pages run out the sequence that comes last (priority, then arrival) is preempted: its pages go, it waits again, and
recomputes what the prefix cache has lost. Plain Python, no device, no threads.
"""

from bisect import insort
from collections.abc import Callable, Iterable

from onebase_server.engine.admission import Admission
from onebase_server.engine.batch import BlockTables, StepPlan, scored_positions
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.pages import PagePool
from onebase_server.engine.residency import Residency
from onebase_server.engine.runner import Runner, Scores, StepResult
from onebase_server.engine.sequence import Sequence, SequenceStatus
from onebase_server.engine.types import FinishReason, TokenLogprob
from onebase_server.engine.waiting import WaitingQueue

SCORE_CHUNK = 256
"""Most tokens of one prompt that a step gives logprobs of: each has logits of its own, a vocabulary wide."""


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


class Scheduler:
    """Owns running and waiting sequences, their pages and their places in the batch."""

    def __init__(
        self, runner: Runner, residency: Residency, config: EngineConfig, on_admit: Callable[[Sequence], None]
    ) -> None:
        self._limits = runner.limits
        self._runner = runner
        self._residency = residency
        self._on_admit = on_admit
        self.page_size = runner.limits.page_size
        self.max_sequences = runner.limits.max_batch_sequences
        self._free_states = list(range(runner.limits.max_batch_sequences - 1, -1, -1))
        self.pages = PagePool(runner.limits.num_pages, prefix_cache=config.prefix_cache)
        self.tables = BlockTables(runner.limits)
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []
        """Best first: (priority, arrival, index)."""
        self.admission = Admission(self, residency, config)
        self.num_preempted = 0

    # Coming and going

    def add(self, sequence: Sequence, now: float) -> None:
        """A new sequence, to wait for its turn."""
        sequence.status = SequenceStatus.WAITING
        sequence.waiting_since = now
        self.waiting.add(sequence)
        self.admission.is_stale = True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence in whatever state: pages, state and place come back. The lease is the engine's."""
        if sequence.status is SequenceStatus.RUNNING:
            self._stop_running(sequence)
        elif sequence.status is SequenceStatus.WAITING:
            self.waiting.remove(sequence)
        elif sequence.status is SequenceStatus.FOLLOWING:
            sequence.group.followers.remove(sequence)
        sequence.status = SequenceStatus.FINISHED

    def start(self, sequence: Sequence, cached_pages: list[int]) -> None:
        """A waiting (or following) sequence joins the batch; `cached_pages` hold the start of its tokens."""
        self.waiting.started(sequence)
        self.pages.share(cached_pages)
        sequence.pages = list(cached_pages)
        sequence.num_computed = len(cached_pages) * self.page_size
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
        sequence.status = SequenceStatus.RUNNING
        state = sequence.row.state_id = self._free_states.pop()
        self.tables.rows[state, : len(cached_pages)] = cached_pages
        entry = sequence.residence
        sequence.slot = -1 if entry is None else self._residency.enter(entry)
        insort(self.running, sequence, key=_order)
        self._on_admit(sequence)

    def preempt(self, sequence: Sequence, now: float) -> None:
        """Take a running sequence out of the batch; it waits again, with what it has generated."""
        self._stop_running(sequence)
        sequence.num_computed = 0
        sequence.status = SequenceStatus.WAITING
        sequence.waiting_since = now
        self.waiting.put_back(sequence)
        self.num_preempted += 1

    def _stop_running(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pages.release(sequence.pages)
        state = sequence.row.state_id
        self.tables.rows[state, : len(sequence.pages)] = 0
        sequence.pages = []
        sequence.row.state_id = -1
        self._free_states.append(state)
        self._runner.release_state(state)
        if sequence.residence is not None:
            self._residency.leave(sequence.residence)
        sequence.slot = -1
        self.admission.is_stale = True

    # One step

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None if nothing can run now."""
        plan = StepPlan()
        for sequence in self.admission.take_yielding():
            self.preempt(sequence, now)
        budget = self._limits.max_batch_tokens - self._schedule_decodes(plan, now)
        budget = self._schedule_chunks(plan, budget, now)
        if budget > 0 and len(self.waiting):
            self.admission.admit(plan, budget, now)
        return plan if plan.sequences else None

    def _schedule_decodes(self, plan: StepPlan, now: float) -> int:
        """One token for every sequence that lacks only its last one. Best first, so victims are not yet in the plan."""
        running, page_size = self.running, self.page_size
        index = 0
        while index < len(running):
            sequence = running[index]
            if len(sequence.ids) - sequence.num_computed == 1:
                if sequence.num_computed == len(sequence.pages) * page_size and not self._grow(sequence, now):
                    continue
                self._pick(plan, sequence, 1)
            index += 1
        return len(plan.sequences)

    def _grow(self, sequence: Sequence, now: float) -> bool:
        """One more page, at the cost of the last in order if need be; False if that was `sequence` itself."""
        while self.pages.num_available == 0:
            victim = self.running[-1]
            self.preempt(victim, now)
            if victim is sequence:
                return False
        self._append_page(sequence)
        return True

    def _append_page(self, sequence: Sequence) -> None:
        page = self.pages.take()
        assert page is not None
        self.tables.rows[sequence.row.state_id, len(sequence.pages)] = page
        sequence.pages.append(page)

    def _schedule_chunks(self, plan: StepPlan, budget: int, now: float) -> int:
        """Prefill of sequences already in the batch, as far as budget and pages go."""
        while True:
            for sequence in self.running:
                if budget <= 0:
                    break
                if len(sequence.ids) - sequence.num_computed > 1:
                    budget -= self.schedule_chunk(plan, sequence, budget)
            if plan.sequences or not self.running:
                return budget
            # All wait for pages that the others hold: the last in order gives way.
            self.preempt(self.running[-1], now)

    def schedule_chunk(self, plan: StepPlan, sequence: Sequence, budget: int) -> int:
        """The next tokens of a sequence, as many as there are pages for; how many that was."""
        count = min(len(sequence.ids) - sequence.num_computed, budget)
        if sequence.scores_prompt:
            count = min(count, SCORE_CHUNK)
        page_size = self.page_size
        missing = -(-(sequence.num_computed + count) // page_size) - len(sequence.pages)
        for _ in range(min(missing, self.pages.num_available)):
            self._append_page(sequence)
        count = min(count, len(sequence.pages) * page_size - sequence.num_computed)
        if count > 0:
            self._pick(plan, sequence, count)
        return count

    def _pick(self, plan: StepPlan, sequence: Sequence, count: int) -> None:
        if sequence.num_computed + count == len(sequence.ids):
            plan.sampling.append(sequence)
            plan.sample_seqs.append(len(plan.sequences))
            if sequence.group.followers and sequence.index == 0:
                self._fork(plan, sequence)
        plan.sequences.append(sequence)
        plan.counts.append(count)

    def _fork(self, plan: StepPlan, leader: Sequence) -> None:
        """The prompt will be computed: followers sample beside the leader. Who finds no place waits like any other."""
        followers, leader.group.followers = leader.group.followers, []
        for follower in followers:
            if len(self.running) < self.max_sequences:
                follower.cached_tokens = leader.cached_tokens
                follower.keys = list(leader.keys)
                follower.turn = (*leader.turn[:3], follower.index)
                self.start(follower, [])
                follower.num_computed = len(follower.ids)  # nothing to compute, until `_share_prompts`
                plan.forks.append((leader, follower))
                plan.sampling.append(follower)
                plan.sample_seqs.append(len(plan.sequences))
            else:
                self.add(follower, leader.group.submitted_at)

    # After the step

    def advance(self, plan: StepPlan, result: StepResult) -> None:
        """Book what the step computed: KV, forks, and one more token for each sampling sequence."""
        if result.scores is not None:
            self._book_scores(plan, result.scores)
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            if sequence.status is not SequenceStatus.RUNNING:  # ended while this step ran
                continue
            computed = sequence.num_computed + count
            if computed // self.page_size != sequence.num_computed // self.page_size:
                self._publish_pages(sequence, computed)
            sequence.num_computed = computed
            if count > 1:
                self.admission.is_stale = True
        if plan.forks:
            self._share_prompts(plan.forks)
        for sequence, token in zip(plan.sampling, result.token_ids.tolist(), strict=True):
            if sequence.finish is not None:
                continue
            sequence.ids.append(token)
            output_ids = sequence.row.output_ids
            output_ids.append(token)
            if token in sequence.stop_ids and len(output_ids) > sequence.row.sampling.min_tokens:
                sequence.finish = FinishReason.STOP
                self.remove(sequence)
            elif len(output_ids) >= sequence.max_tokens:
                sequence.finish = FinishReason.LENGTH
                self.remove(sequence)

    def _book_scores(self, plan: StepPlan, scores: Scores) -> None:
        """Logprobs of prompt tokens, in the order in which `pack` asked for them."""
        row = 0
        for sequence, count in zip(plan.sequences, plan.counts, strict=True):
            top = sequence.row.sampling.prompt_logprobs or 0
            found = []
            for position in scored_positions(sequence, count):
                ids, values = scores.top_ids[row, :top].tolist(), scores.top_logprobs[row, :top].tolist()
                best = tuple(zip(ids, values, strict=True))
                found.append(TokenLogprob(sequence.ids[position + 1], float(scores.logprobs[row]), best))
                row += 1
            sequence.group.prompt_logprobs += found

    def _publish_pages(self, sequence: Sequence, computed: int) -> None:
        if not self.pages.is_caching:
            return
        keys = sequence.needed_keys(self.page_size)
        for index in range(sequence.num_computed // self.page_size, computed // self.page_size):
            self.pages.publish(sequence.pages[index], keys[index])

    def _share_prompts(self, forks: Iterable[tuple[Sequence, Sequence]]) -> None:
        """Followers hold the leader's full pages, and a copy of the last one if it is not full."""
        copies = []
        for leader, follower in forks:
            full, partial = divmod(leader.num_computed, self.page_size)
            shared = leader.pages[:full]
            self.pages.share(shared)
            follower.pages = list(shared)
            follower.num_computed = full * self.page_size
            self.tables.rows[follower.row.state_id, :full] = shared
            if partial and self.pages.num_available:
                self._append_page(follower)
                copies.append((leader.pages[full], follower.pages[full]))
                follower.num_computed = leader.num_computed
        if copies:
            self._runner.copy_pages(copies)
