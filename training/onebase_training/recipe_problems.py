"""What a recipe's sections refuse, and what is wrong in words that name the key as the recipe's author wrote it."""

import difflib
import re
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

from onebase_training.seed_config import SEED_NAMES

_OTHER_WORDS: Final = {
    "rank": "r",
    "lora_r": "r",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "layers_to_transform": "layers",
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "optim": "optimizer",
    "base_model": "base",
    "model_name": "name",
    "dataset": "data",
    "context_window": "max_tokens",
    "max_length": "max_tokens",
}
"""What other trainers call our keys."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` is true in YAML, and Python would take it for 1."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"must not be {str(value).lower()}")
        return value


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]


def key_of(detail: Any, *, is_seed: bool) -> str:
    """`section.key` of one of pydantic's errors; in a seed file the seed's own key."""
    parts = [str(part) for part in detail["loc"]]
    where = ".".join(part for part in parts if not _is_type(part))
    return SEED_NAMES.get(where, where) if is_seed else where


def told(detail: Any, recipe: type[BaseModel], element: type[BaseModel], *, is_seed: bool) -> str:
    """One error as `key: what is wrong`, with near names for an unknown key. `element` is what lists hold."""
    where = key_of(detail, is_seed=is_seed)
    if detail["type"] == "model_type":
        return f"{where}: must hold keys and values"
    if detail["type"] != "extra_forbidden":
        return f"{where}: {detail['msg'].removeprefix('Value error, ')}"
    section: Any = recipe
    for part in detail["loc"][:-1]:
        field = getattr(section, "model_fields", {}).get(str(part))
        section = field.annotation if field and not isinstance(part, int) else element
    known = list(getattr(section, "model_fields", ()))
    key = str(detail["loc"][-1])
    near = [_OTHER_WORDS[key]] if _OTHER_WORDS.get(key) in known else difflib.get_close_matches(key, known, 3, 0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the keys here are {', '.join(known)}"
    return f"{where}: unknown key; {hint}"


def _is_type(part: str) -> bool:
    """pydantic names the branch of a union that it tried, such as `int`, `literal['auto']` or `tuple[str, ...]`."""
    return part in ("int", "float", "bool", "str") or part.startswith(
        ("literal[", "constrained", "tuple[", "function-")
    )
