"""Responses kept for a time, so that `previous_response_id` can go on from them: in memory, by owner, bounded.

Bounded in time, in number and in bytes: what was used least recently goes first. A restart forgets them, as their
clients must expect of anything that expires; what must last is kept by the client.
"""

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from onebase.errors import InvalidInput, NotFound
from onebase_server.api.schemas_chat import ChatMessage
from onebase_server.api.schemas_response_reply import ResponseBody, StoredInputItem

KEEP_S = 24 * 3600.0
MAX_KEPT = 10_000
MAX_BYTES = 256_000_000
OBJECT_BYTES = 2048
"""What one message, item or response takes in memory besides its text (a pydantic object with its dicts)."""


@dataclass(frozen=True, slots=True)
class Kept:
    owner: str
    response: ResponseBody
    conversation: list[ChatMessage]
    """Everything said up to and with this response, without instructions."""
    items: list[StoredInputItem]
    """What this request alone put in."""
    until: float
    own_bytes: int
    """Of the response and the items; messages are shared with the responses that go on from this one."""


@dataclass(slots=True)
class Shared:
    """A message that `holders` kept responses have in their conversations: it counts once."""

    size: int
    holders: int = 0


class ResponseStore:
    """Used on the event loop only. `num_bytes` is an estimate from above: the text, and so much for each object."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, max_bytes: int = MAX_BYTES) -> None:
        self._clock = clock
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._messages: dict[int, Shared] = {}
        self.num_bytes = 0

    def keep(
        self, owner: str, response: ResponseBody, conversation: list[ChatMessage], items: list[StoredInputItem]
    ) -> None:
        """One that is larger than the whole store is not kept, and nothing is forgotten for it."""
        sizes = {id(message): size_of(message) for message in conversation}
        own = size_of(response) + sum(map(size_of, items))
        if own + sum(sizes.values()) > self._max_bytes:
            return
        self._drop(response.id)
        kept = Kept(owner, response, conversation, items, self._clock() + KEEP_S, own)
        self._kept[response.id] = kept
        self.num_bytes += own
        for message in conversation:
            shared = self._messages.get(id(message))
            if shared is None:
                shared = self._messages[id(message)] = Shared(sizes[id(message)])
                self.num_bytes += shared.size
            shared.holders += 1
        while len(self._kept) > MAX_KEPT or self.num_bytes > self._max_bytes or self._oldest_is_over():
            self._drop(next(iter(self._kept)))

    def get(self, response_id: str, owner: str | None) -> Kept:
        """`owner`: None sees all. Raises NotFound for what is not there, and for what is another's."""
        kept = self._kept.get(response_id)
        if kept is not None and kept.until < self._clock():
            self._drop(response_id)
            kept = None
        if kept is None or owner not in (None, kept.owner):
            raise NotFound(f"Response with id '{response_id}' not found.", param="id")
        self._kept.move_to_end(response_id)
        return kept

    def history(self, response_id: str | None, owner: str | None) -> list[ChatMessage]:
        """The conversation to go on from."""
        if response_id is None:
            return []
        try:
            return self.get(response_id, owner).conversation
        except NotFound as error:
            raise InvalidInput(
                f"Previous response with id '{response_id}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
            ) from error

    def delete(self, response_id: str, owner: str | None) -> None:
        self.get(response_id, owner)
        self._drop(response_id)

    def _oldest_is_over(self) -> bool:
        return bool(self._kept) and next(iter(self._kept.values())).until < self._clock()

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id, None)
        if kept is None:
            return
        self.num_bytes -= kept.own_bytes
        for message in kept.conversation:
            shared = self._messages[id(message)]
            shared.holders -= 1
            if not shared.holders:
                self.num_bytes -= shared.size
                del self._messages[id(message)]


def size_of(model: ChatMessage | ResponseBody | StoredInputItem) -> int:
    """Bytes in memory, not too few: the text as one string (1 to 4 bytes a character), and its objects."""
    return OBJECT_BYTES + sys.getsizeof(model.model_dump_json(exclude_unset=True))
