"""What is odd about a sound record: it can be trained on, but its author may not have meant it so. No tokens.

`onebase data check` counts these with their lines; training takes the records as they are.
"""

from itertools import pairwise
from typing import Final

from onebase_training.records import Conversation, PlainText, Record

STARTS_WITH_ANSWER: Final = "start with an answer that no question stands before"
USERS_IN_A_ROW: Final = "have two user turns in a row"
ANSWERS_IN_A_ROW: Final = "have two answers in a row"
EMPTY_TURN: Final = "have a turn without text that is no answer"
EMPTY_ANSWER: Final = "have an empty answer: what is learnt is to say nothing"
ENDS_WITHOUT_ANSWER: Final = "end with a turn that no answer follows: it is left in and nothing is learnt from it"
LATE_SYSTEM: Final = "have a system turn that is not the first"
UNKNOWN_SPEAKER: Final = "have an unknown speaker, kept under a header of its own"
BLANK: Final = "have no text"


def oddities(record: Record) -> list[str]:
    """Each of the above that holds, as the end of the sentence `3 records ...`."""
    if isinstance(record, PlainText):
        return [] if record.text.strip() else [BLANK]
    spoken = [message for message in record.messages if not message.is_system]
    roles = [message.role for message in spoken]
    pairs = set(pairwise(roles))
    found = {
        STARTS_WITH_ANSWER: roles[:1] == ["assistant"],
        USERS_IN_A_ROW: ("user", "user") in pairs,
        ANSWERS_IN_A_ROW: ("assistant", "assistant") in pairs,
        EMPTY_TURN: any(not m.content.strip() for m in record.messages if m.role != "assistant"),
        EMPTY_ANSWER: any(m.is_supervised and not m.content.strip() and not m.tool_calls for m in spoken),
        ENDS_WITHOUT_ANSWER: roles[-1:] != ["assistant"],
        LATE_SYSTEM: _has_late_system(record),
        UNKNOWN_SPEAKER: bool(record.unknown),
    }
    return [text for text, holds in found.items() if holds]


def _has_late_system(record: Conversation) -> bool:
    systems = [message.is_system for message in record.messages]
    return any(late and not before for before, late in pairwise(systems))
