"""Constrained decoding between the engine and a grammar backend: compile off the thread, masks before every token.

A mask is wanted only when the logits are there. So it is filled after the step was launched: a device that works on by
itself does not wait for it.
"""

import queue
from collections.abc import Callable, Iterable
from concurrent.futures import Executor

from onebase.errors import EngineError
from onebase_server.engine import commands
from onebase_server.engine.grammar import GrammarBackend
from onebase_server.engine.sequence import RequestGroup, Sequence

Fail = Callable[[Sequence, EngineError], None]


class ConstrainedDecoding:
    """Sequences that follow a grammar. Engine thread only, but for the compiling."""

    def __init__(
        self,
        backend: GrammarBackend | None,
        executor: Executor,
        inbox: "queue.SimpleQueue[commands.Command]",
        vocab_size: int,
    ) -> None:
        self._backend = backend
        self._executor = executor
        self._inbox = inbox
        self._vocab_size = vocab_size
        self.sequences: set[Sequence] = set()
        self._unfilled: list[Sequence] = []
        """Whose mask is of a token before."""

    def compile(self, group: RequestGroup) -> None:
        """Start to compile the request's grammar; it is not admitted before `start`."""
        if group.request.sampling.grammar is not None:
            group.awaits_grammar = True
            self._executor.submit(self._compile, group, group.request.sampling.grammar)

    def start(self, command: commands.GrammarCompiled, fail: Fail) -> None:
        """The grammar is there: every choice gets a matcher of its own."""
        assert command.matcher is not None
        command.group.awaits_grammar = False
        for sequence in command.group.sequences:
            if sequence.finish is None:
                try:
                    sequence.constrain(command.matcher.fork(), self._vocab_size)
                except EngineError as error:
                    fail(sequence, error)
                else:
                    self.sequences.add(sequence)
                    self._unfilled.append(sequence)

    def advance(self, sampled: Iterable[Sequence], fail: Fail) -> None:
        """Follow the sampled tokens."""
        if not self.sequences:
            return
        for sequence in sampled:
            if sequence.matcher is not None and sequence.finish is None:
                try:
                    sequence.follow_grammar()
                except EngineError as error:
                    fail(sequence, error)
                else:
                    self._unfilled.append(sequence)

    def fill_masks(self, fail: Fail) -> None:
        """Before anything is sampled, and once the step is under way: who fails here is in it."""
        unfilled, self._unfilled = self._unfilled, []
        for sequence in unfilled:
            if sequence.finish is None:
                try:
                    sequence.fill_mask()
                except EngineError as error:
                    sequence.row.mask = None
                    fail(sequence, error)

    def forget(self, sequence: Sequence) -> None:
        self.sequences.discard(sequence)

    def _compile(self, group: RequestGroup, grammar: str) -> None:
        """On a loader thread."""
        assert self._backend is not None
        try:
            matcher = self._backend.compile(grammar, group.request.sampling.trigger)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the request
            self._inbox.put(commands.GrammarCompiled(group, None, error))
        else:
            self._inbox.put(commands.GrammarCompiled(group, matcher, None))
