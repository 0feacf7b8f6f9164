"""Checks that answers must pass, as `onebase eval --check` takes them, and which models fail them. No torch.

A check is a regular expression that must be found in an answer, by a name; `exact` is the answer itself as it stands
in the file. The recipe's own (`eval.checks`) are measured always; those named by `--check` decide the exit code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pydantic import ValidationError

from onebase.errors import InvalidInput
from onebase_training.config import EvalConfig, Recipe

EXACT: Final = "exact"


class Measured(Protocol):
    """What is judged: shares from 0 to 1, None where there was no answer."""

    @property
    def model(self) -> str: ...
    @property
    def exact_match(self) -> float | None: ...
    @property
    def checks(self) -> Mapping[str, float]: ...


@dataclass(frozen=True, slots=True)
class Failure:
    """A model that passes a check less often than was asked."""

    model: str
    check: str
    share: float | None
    at_least: float

    def __str__(self) -> str:
        share = "no answer to check" if self.share is None else f"{self.share:.1%} of the answers"
        return f"{self.model} fails {self.check}: {share}, at least {self.at_least:.1%} must pass"


def with_checks(recipe: Recipe, given: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe with the new checks of `given` (`NAME=REGEX`, or the name of a known one), and the names of all given.

    Raises InvalidInput for an unknown name and for what is no regular expression.
    """
    new = dict(text.split("=", 1) for text in given if "=" in text)
    names = [text.partition("=")[0] for text in given]
    try:
        checks = EvalConfig(checks={**recipe.eval.checks, **new})
    except ValidationError as error:
        raise InvalidInput(
            f"--check {error.errors()[0]['msg'].removeprefix('Value error, ')}", param="check"
        ) from error
    if EXACT in checks.checks:
        raise InvalidInput(
            f"--check: {EXACT!r} is the answer as it stands in the file; take another name", param="check"
        )
    for name in names:
        if name not in checks.checks and name != EXACT:
            known = ", ".join([EXACT, *checks.checks])
            raise InvalidInput(f"--check {name}: there is {known}; or give NAME=REGEX", param="check")
    return recipe.model_copy(update={"eval": checks}), names


def failures(results: Sequence[Measured], names: Sequence[str], at_least: float) -> list[Failure]:
    """Of each model, in the order of the checks."""
    found = []
    for result in results:
        for name in names:
            share = result.exact_match if name == EXACT else result.checks.get(name)
            if share is None or share < at_least - 1e-9:
                found.append(Failure(result.model, name, share, at_least))
    return found
