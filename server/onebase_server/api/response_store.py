"""Responses kept for a time, so that `previous_response_id` can go on from them: in memory, by owner, bounded.

A restart forgets them, as their clients must expect of anything that expires; what must last is kept by the client.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from onebase.errors import InvalidInput, NotFound
from onebase_server.api.schemas_chat import ChatMessage
from onebase_server.api.schemas_responses import ResponseBody, StoredInputItem

KEEP_S = 24 * 3600.0
MAX_KEPT = 10_000


@dataclass(frozen=True, slots=True)
class Kept:
    owner: str
    response: ResponseBody
    conversation: list[ChatMessage]
    """Everything said up to and with this response, without instructions."""
    items: list[StoredInputItem]
    """What this request alone put in."""
    until: float


class ResponseStore:
    """Used on the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def keep(
        self, owner: str, response: ResponseBody, conversation: list[ChatMessage], items: list[StoredInputItem]
    ) -> None:
        self._kept[response.id] = Kept(owner, response, conversation, items, self._clock() + KEEP_S)
        while self._kept and (len(self._kept) > MAX_KEPT or next(iter(self._kept.values())).until < self._clock()):
            self._kept.popitem(last=False)

    def get(self, response_id: str, owner: str | None) -> Kept:
        """`owner`: None sees all. Raises NotFound for what is not there, and for what is another's."""
        kept = self._kept.get(response_id)
        if kept is None or kept.until < self._clock() or owner not in (None, kept.owner):
            raise NotFound(f"Response with id '{response_id}' not found.", param="id")
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
        del self._kept[response_id]
