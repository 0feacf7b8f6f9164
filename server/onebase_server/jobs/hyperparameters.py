"""OpenAI's three hyperparameters -> the recipe's. "auto" stays until the number of examples is known.

The rule for epochs is the one that OpenAI's cookbook publishes; a learning rate multiplier of 1 is QLoRA's 2e-4.
"""

from collections.abc import Mapping
from typing import Any, Final

NAMES: Final = ("n_epochs", "batch_size", "learning_rate_multiplier")
AUTO: Final = dict.fromkeys(NAMES, "auto")

TARGET_EPOCHS: Final = 3
MIN_SEEN, MAX_SEEN = 100, 25_000
MAX_EPOCHS: Final = 25
SMALL_FILE: Final = 256
LEARNING_RATE: Final = 2e-4


def decided(given: Mapping[str, Any], examples: int) -> dict[str, Any]:
    """The same with numbers in place of "auto"."""
    rules = {"n_epochs": auto_epochs(examples), "batch_size": auto_batch(examples), "learning_rate_multiplier": 1}
    return {name: rules[name] if given.get(name, "auto") == "auto" else given[name] for name in NAMES}


def auto_epochs(examples: int) -> int:
    """3, more for small files and fewer for large ones."""
    if examples * TARGET_EPOCHS < MIN_SEEN:
        return min(MAX_EPOCHS, MIN_SEEN // examples)
    if examples * TARGET_EPOCHS > MAX_SEEN:
        return max(1, MAX_SEEN // examples)
    return TARGET_EPOCHS


def auto_batch(examples: int) -> int:
    return 4 if examples < SMALL_FILE else 8


def to_recipe(hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the recipe's `train` section, from decided numbers."""
    return {
        "epochs": float(hyperparameters["n_epochs"]),
        "batch_size": int(hyperparameters["batch_size"]),
        "learning_rate": LEARNING_RATE * float(hyperparameters["learning_rate_multiplier"]),
    }
