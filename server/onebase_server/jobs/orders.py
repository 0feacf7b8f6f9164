"""What can be ordered, as values: a fine-tuning job (OpenAI's door) and a retraining (the admin's). No wire types.

An order names the base that the server holds, and everything else by ids that the caller may see; nothing is looked
up here.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Base:
    """The base to train on: its id is what clients see, its path is what the trainer gets."""

    id: str
    path: str


@dataclass(frozen=True, slots=True)
class Gate:
    """When a candidate may take the current version's place, both measured on the same held-out conversations."""

    max_loss_increase: float = 0.02
    """Of the mean response loss, in nats a token, against the current version's."""
    max_stop_rate_drop: float = 0.05
    """Of the share of answers that end by themselves."""
    max_examples: int = 100
    """Held-out conversations to generate answers for."""


@dataclass(frozen=True, slots=True)
class FineTuningOrder:
    """OpenAI's job. `hyperparameters` has the three names, each a number or "auto"."""

    owner: str
    base: Base
    model: str
    """As the client named it: the base, or a model to go on from."""
    training_file: str
    validation_file: str | None = None
    start_from: str | None = None
    """`name@version` if `model` is no base."""
    suffix: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] | None = None
    method: Mapping[str, Any] | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    has_integrations: bool = False
    prompt_format: str | None = None


@dataclass(frozen=True, slots=True)
class RetrainOrder:
    """The admin's: the adapter's next version, from one of three sources."""

    owner: str
    base: Base
    adapter: str
    dataset: Path | None = None
    training_file: str | None = None
    stored_chats: bool = False
    preset: Literal["default", "seed"] = "default"
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `recipe.KNOBS`."""
    prompt_format: str | None = None
    start_from: str | None = None
    seed: int | None = None
    gate: Gate | None = None
    priority: int = 0
    served_now: Callable[[], Mapping[int, float]] | None = None
    """Asked as the job is made: the adapter's versions and shares. None: not known, and the name may be moved."""


@dataclass(frozen=True, slots=True)
class Once:
    """An owner's idempotency key. `digest`: of the request that came with it as it was sent, since what a request means
    changes: a retry must find its job also when the model to go on from has moved, or the file is gone."""

    key: str
    digest: str

    @classmethod
    def of(cls, key: str, door: str, request: Mapping[str, Any]) -> "Once":
        """`door`: where it was sent to. `request`: as JSON has it."""
        words = json.dumps([door, request], sort_keys=True)
        return cls(key, hashlib.sha256(words.encode()).hexdigest())
