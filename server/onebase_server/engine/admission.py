"""Who joins the batch: waiting sequences in their turn, past those whose adapter is not there yet.

A sequence whose adapter is being loaded, or finds no slot, is passed over and not waited for. So that it does not
starve, after `fairness_wait_s` one of the adapters in the slots must drain for it, the one that will be done first.
"""

from typing import TYPE_CHECKING

from onebase_server.engine.batch import StepPlan
from onebase_server.engine.config import EngineConfig
from onebase_server.engine.prefix_cache import PageKey
from onebase_server.engine.residence import Residence, Want
from onebase_server.engine.residency import Residency
from onebase_server.engine.sequence import Sequence, SequenceStatus

if TYPE_CHECKING:
    from onebase_server.engine.scheduler import Scheduler

RESCAN_S = 0.01
"""The queue is looked through when something has changed, and at least this often for what depends on time."""


class Admission:
    """Looks through the waiting queue once a step at most."""

    def __init__(self, scheduler: "Scheduler", residency: Residency, config: EngineConfig) -> None:
        self._scheduler = scheduler
        self._residency = residency
        self._config = config
        self._scanned_at = float("-inf")
        self.is_stale = True
        """Something has changed since the last scan."""
        self._overdue: list[Residence] = []
        self._yielding: list[Sequence] = []

    def take_yielding(self) -> list[Sequence]:
        """Running sequences that must give way, to be preempted before the step is planned: their adapter has drained
        for too long, or a request of a better priority found no place."""
        if not self._overdue and not self._yielding:
            return []
        drained = [entry for entry in self._overdue if self._residency.slots.is_draining(entry)]
        yielding = [sequence for sequence in self._yielding if sequence.status is SequenceStatus.RUNNING]
        yielding += [s for s in self._scheduler.running if s.residence in drained and s not in yielding]
        self._overdue, self._yielding = [], []
        return yielding

    def admit(self, plan: StepPlan, budget: int, now: float) -> None:
        """Start waiting sequences and give them their first chunk, until the budget is spent."""
        if not self.is_stale and now - self._scanned_at < RESCAN_S:
            return
        self.is_stale = False
        self._scanned_at = now
        scheduler = self._scheduler
        passed: set[str] = set()
        computing = self._keys_being_computed()
        admitted = False
        for sequence in scheduler.waiting:
            has_place = len(scheduler.running) < scheduler.max_sequences
            if budget <= 0 or not (has_place or self._outranks_last(sequence)):
                self.is_stale = budget <= 0
                break
            entry = sequence.residence
            if sequence.group.awaits_grammar:
                continue
            if entry is not None and (entry.ref.digest in passed or not self._is_ready(entry, sequence, now)):
                passed.add(entry.ref.digest)
                continue
            cached = self._cached_pages(sequence)
            if self._is_being_computed(sequence, len(cached), computing):
                continue
            if not has_place or not self._has_pages(sequence, cached):
                if self._outranks_last(sequence):
                    self._yielding.append(scheduler.running[-1])
                break
            scheduler.start(sequence, cached)
            admitted = True
            budget -= scheduler.schedule_chunk(plan, sequence, budget)
            if scheduler.pages.is_caching:
                computing.update(self._missing_keys(sequence))
        if admitted:
            scheduler.waiting.sweep()

    def _outranks_last(self, sequence: Sequence) -> bool:
        """Whether the last of the running sequences has to give way to it: by priority only."""
        running = self._scheduler.running
        return bool(running) and sequence.order[0] < running[-1].order[0]

    # Adapters

    def _is_ready(self, entry: Residence, sequence: Sequence, now: float) -> bool:
        if self._residency.slots.is_draining(entry):
            self._check_overdue(entry, now)
            return False
        want = self._residency.want(entry)
        if want is Want.NO_SLOT and now - sequence.waiting_since >= self._config.fairness_wait_s:
            self._drain_for(entry, now)
        return want is Want.READY

    def _drain_for(self, beneficiary: Residence, now: float) -> None:
        """Have the adapter drain, of those in slots, whose running sequences have the least left to do."""
        residents = self._residency.slots.residents
        if any(resident.drains_for is beneficiary for resident in residents):
            for resident in residents:
                if resident.drains_for is beneficiary:
                    self._check_overdue(resident, now)
            return
        remaining = {resident.ref.digest: 0 for resident in residents if resident.drains_for is None}
        for sequence in self._scheduler.running:
            entry = sequence.residence
            if entry is not None and entry.ref.digest in remaining:
                left = sequence.max_tokens - len(sequence.row.output_ids)
                remaining[entry.ref.digest] = max(remaining[entry.ref.digest], left)
        candidates = [entry for entry in residents if entry.ref.digest in remaining and entry.is_copied]
        if candidates:
            victim = min(candidates, key=lambda entry: (entry.is_pinned, remaining[entry.ref.digest]))
            self._residency.slots.drain(victim, beneficiary, now)
            self.is_stale = True

    def _check_overdue(self, entry: Residence, now: float) -> None:
        if entry.num_running and now - entry.drains_since >= self._config.drain_limit_s:
            self._overdue.append(entry)

    # Pages

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """Cached pages of the sequence's start; at least one token is left to compute, or there'd be no logits."""
        page_size = self._scheduler.page_size
        if not self._scheduler.pages.is_caching or sequence.scores_prompt:
            return []
        limit = (len(sequence.ids) - 1) // page_size
        return self._scheduler.pages.find(sequence.needed_keys(page_size), limit)

    def _has_pages(self, sequence: Sequence, cached: list[int]) -> bool:
        """Room for all its tokens and the next, leaving one page to each running sequence to grow into."""
        pages = self._scheduler.pages
        needed = -(-(len(sequence.ids) + 1) // self._scheduler.page_size) - len(cached)
        reserve = len(self._scheduler.running)
        return pages.num_available - pages.count_idle(cached) >= needed + reserve

    def _keys_being_computed(self) -> set[PageKey]:
        keys: set[PageKey] = set()
        if not self._scheduler.pages.is_caching:
            return keys
        for sequence in self._scheduler.running:
            if len(sequence.ids) - sequence.num_computed > 1:
                keys.update(self._missing_keys(sequence))
        return keys

    def _missing_keys(self, sequence: Sequence) -> list[PageKey]:
        page_size = self._scheduler.page_size
        return sequence.needed_keys(page_size)[sequence.num_computed // page_size :]

    def _is_being_computed(self, sequence: Sequence, num_cached: int, computing: set[PageKey]) -> bool:
        """Whether a running sequence is about to compute this one's next page: then wait and share it."""
        page_size = self._scheduler.page_size
        if not computing or sequence.scores_prompt or num_cached >= (len(sequence.ids) - 1) // page_size:
            return False
        return sequence.keys[num_cached] in computing
