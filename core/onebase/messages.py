"""A conversation as values: OpenAI's chat vocabulary without its wire format.

Both sides build these: the server from requests, training from dataset lines. How they become tokens is the
renderer's business (`prompt.py`); nothing here knows a header or a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from onebase.errors import InvalidInput

Role = Literal["system", "developer", "user", "assistant", "tool", "function"]
ROLES: tuple[str, ...] = get_args(Role)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant makes. `arguments` is a JSON text, as in OpenAI's API; models may break it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that the assistant may call. `parameters` is a JSON Schema object."""

    name: str
    description: str = ""
    parameters: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is "" where the API has null.

    `weight` (training only, assistant only): 0 keeps the turn in the context without learning it; None means 1.
    Raises InvalidInput for an unknown role or a weight other than 0 and 1.
    """

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise InvalidInput(f"unknown role {self.role!r}; use one of {', '.join(ROLES)}", param="messages")
        if self.weight not in (None, 0, 1):
            raise InvalidInput(f"weight must be 0 or 1, not {self.weight!r}", param="messages")

    @property
    def is_system(self) -> bool:
        """A `developer` message is a `system` message under its newer name."""
        return self.role in ("system", "developer")

    @property
    def is_supervised(self) -> bool:
        """Whether training learns this message."""
        return self.role == "assistant" and self.weight != 0
