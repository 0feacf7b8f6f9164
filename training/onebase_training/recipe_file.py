"""A recipe's YAML text -> plain values, whatever the text holds. Knows YAML, not what a recipe means.

YAML can hold more than values: objects to build, keys given twice (the last wins in silence), and references that
make a few lines into gigabytes. None of that is a recipe, and each is told with its line.
"""

from pathlib import Path
from typing import Any, Final

import yaml

from onebase.errors import RecipeError

_LARGEST: Final = 4 << 20
_MOST_VALUES: Final = 100_000
_DEEPEST: Final = 40
_TAG: Final = "tag:yaml.org,2002:"
_PLAIN: Final = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's keys and values. Raises RecipeError."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(_LARGEST + 1)
        if len(raw) > _LARGEST:
            raise RecipeError(f"{path} is larger than 4 MB: a recipe is a page of YAML", param="recipe")
        return parse_yaml(raw.decode("utf-8-sig"), str(path))
    except OSError as error:
        raise RecipeError(f"can't read the recipe {path}: {error.strerror}", param="recipe") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8; save the file as UTF-8", param="recipe") from error


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """The same from a text; `name` is what errors call it."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name} must hold keys and values, such as name:, base:, data:", param="recipe")
        _Walk(name).count(node, 0)
        values: dict[str, Any] = loader.construct_document(node)
        return values
    except (yaml.YAMLError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise RecipeError(f"{name} is not YAML: {reason}", param="recipe") from error
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # PyYAML's for `!!int ""` and the like
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{name}: a value is not what its tag says: {error}", param="recipe") from error


class _Walk:
    """Over the tree as it is written, before anything is built of it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._sizes: dict[int, int] = {}
        self._open: set[int] = set()

    def count(self, node: Any, depth: int) -> int:
        """How many values the node stands for, each reference counted in full. Raises RecipeError."""
        if id(node) in self._sizes:
            return self._sizes[id(node)]
        if id(node) in self._open:
            self._refuse(node, "a value that refers to itself")
        if depth > _DEEPEST:
            self._refuse(node, "nested too deeply")
        if node.tag not in _PLAIN:
            what = node.tag.removeprefix(_TAG)
            hint = "; put it in quotes" if what == "timestamp" else ""
            self._refuse(node, f"a value of type {what}, which no key takes{hint}")
        self._open.add(id(node))
        size = 1
        if isinstance(node, yaml.MappingNode):
            self._check_keys(node)
            size += sum(self.count(value, depth + 1) for _, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(self.count(item, depth + 1) for item in node.value)
        if size > _MOST_VALUES:
            self._refuse(node, f"more than {_MOST_VALUES:,} values, references counted in full")
        self._open.discard(id(node))
        self._sizes[id(node)] = size
        return size

    def _check_keys(self, node: yaml.MappingNode) -> None:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == _TAG + "merge":
                continue
            if key.tag != _TAG + "str":
                self._refuse(key, f"the key {str(key.value)[:40]!r} is no word; put it in quotes")
            if key.value in seen:
                self._refuse(key, f"the key {key.value[:40]!r} stands twice in its section")
            seen.add(key.value)

    def _refuse(self, node: Any, reason: str) -> None:
        raise RecipeError(f"{self._name}, line {node.start_mark.line + 1}: {reason}", param="recipe")
