"""Read a tokenizer's files and edit its JSON in memory: which ids are special, which rule adds a leading space.

Pure functions over parsed JSON. Nothing on disk is changed, and no id is ever added: a token that a careless
trainer appended behind the embedding's last row (`[PAD]`) stays plain text.
Sources: the file formats of `tokenizers` (tokenizer.json) and `transformers` (tokenizer_config.json, config.json).
"""

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebase.errors import BaseModelError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The parsed JSON of a base's folder; absent optional files are empty."""

    tokenizer: Json
    tokenizer_config: Json
    config: Json
    generation_config: Json

    @classmethod
    def read(cls, folder: Path) -> "TokenizerFiles":
        """Raises BaseModelError naming the file that is missing or not JSON."""
        if not (folder / "tokenizer.json").is_file():
            raise BaseModelError(
                f"{folder} has no tokenizer.json; load the tokenizer once with transformers' AutoTokenizer and "
                "save_pretrained() it there"
            )
        names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
        return cls(*(_read_json(folder / name) for name in names))


def _read_json(path: Path) -> Json:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise BaseModelError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def vocabulary(tokenizer: Json) -> dict[str, int]:
    """Every token of the model and of the added tokens -> id."""
    vocab = tokenizer["model"]["vocab"]
    tokens = dict(vocab) if isinstance(vocab, dict) else {piece: i for i, (piece, _) in enumerate(vocab)}
    return tokens | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}


def token_named(files: TokenizerFiles, field: str) -> int | None:
    """The id of tokenizer_config.json's `eos_token` and the like (a text, or an object with `content`)."""
    value = files.tokenizer_config.get(field)
    content = value.get("content") if isinstance(value, dict) else value
    return vocabulary(files.tokenizer).get(content) if isinstance(content, str) else None


def ids_named(config: Json, field: str) -> tuple[int, ...]:
    """config.json's `eos_token_id` and the like: one id, a list of ids, or nothing."""
    value = config.get(field)
    if value is None and isinstance(config.get("text_config"), dict):
        value = config["text_config"].get(field)
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def with_special(tokenizer: Json, ids: frozenset[int], rows: int) -> Json:
    """A copy where the added tokens `ids`, and all behind the embedding's last row, are marked special.

    Special is what keeps them out of ordinary text: `encode_special_tokens` splits special tokens only.
    """
    edited = copy.deepcopy(tokenizer)
    edited["truncation"] = None
    edited["padding"] = None
    added = edited.get("added_tokens") or []
    for token in added:
        if token["id"] in ids or token["id"] >= rows:
            token["special"] = True
    known = {token["id"] for token in added}
    named = {i: content for content, i in vocabulary(tokenizer).items() if i in ids - known}
    # An eos that stands only in the vocabulary would be reachable by merges; as an added token it is known.
    added += [
        {
            "id": i,
            "content": content,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, content in named.items()
    ]
    edited["added_tokens"] = sorted(added, key=lambda token: token["id"])
    return edited


def without_dummy_prefix(tokenizer: Json) -> Json:
    """A copy that puts no space in front of a text (SentencePiece's `add_dummy_prefix`, `add_prefix_space`)."""
    edited = copy.deepcopy(tokenizer)
    edited["normalizer"] = _without_prepend(edited.get("normalizer"))
    for step in _steps(edited.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            step["prepend_scheme"] = "never"
            step.pop("add_prefix_space", None)
        elif step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
    return edited


def _without_prepend(normalizer: Json | None) -> Json | None:
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [_without_prepend(step) for step in normalizer["normalizers"]]
        return normalizer | {"normalizers": [step for step in kept if step is not None]}
    return normalizer


def _steps(part: Json | None, children: str) -> Iterator[Json]:
    """The steps of a possibly nested `Sequence`."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for step in part[children]:
            yield from _steps(step, children)
    else:
        yield part


def is_byte_level(tokenizer: Json) -> bool:
    """GPT-2's kind: each character of a token stands for one byte."""
    steps = [*_steps(tokenizer.get("decoder"), "decoders")]
    steps += _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "ByteLevel" for step in steps)


def space_mark(tokenizer: Json) -> str | None:
    """The character that stands for a space in tokens (SentencePiece's U+2581), or None."""
    for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace":
            return str(step["replacement"])
    for step in _steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Replace" and step["pattern"].get("String") == " ":
            return str(step["content"])
    return None
