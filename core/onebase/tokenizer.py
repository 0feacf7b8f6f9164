"""Text <-> token ids, exactly. Built on the `tokenizers` library; knows nothing of prompts or models.

Three promises that generic tokenizers break: what a user types never becomes a control token; segments can be
encoded one by one and concatenated (no dummy space in later ones); and every id has exact bytes, so that
`b"".join(map(token_bytes, ids))` is the text. See docs/decisions/0002-prompt-borders.md.
"""

import json
import re
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from onebase.errors import BaseModelError, InvalidInput
from onebase.token_bytes import lacking_bytes, token_bytes_table
from onebase.tokenizer_files import (
    Json,
    TokenizerFiles,
    ids_named,
    is_byte_level,
    space_mark,
    token_named,
    vocabulary,
    with_special,
    without_dummy_prefix,
)

KEPT_TEXTS, KEPT_CHARS = 256, 8192
"""How many texts are remembered with their ids, and how long they may be: some MB at most."""


class TextTokenizer:
    """A base's tokenizer. Thread-safe. Load with `TextTokenizer.load(folder)`.

    `bos_id` is the id that the tokenizer itself puts in front of a text, None if it puts none (SmolLM2 names a bos
    token that it never adds; `bos_token_text` is that name, for templates). `eos_ids` are all ids that end an answer;
    `eos_id` is the one that training appends. `pad_id` is an id with an embedding row that is not an eos.
    `vocab_size` counts embedding rows.
    """

    bos_id: int | None
    eos_id: int
    eos_ids: frozenset[int]
    pad_id: int
    vocab_size: int
    bos_token_text: str

    def __init__(self, files: TokenizerFiles) -> None:
        vocab = vocabulary(files.tokenizer)
        rows = ids_named(files.config, "vocab_size")
        self.vocab_size = rows[0] if rows else max(vocab.values()) + 1
        self.eos_id, self.eos_ids = _eos(files)
        controls = self.eos_ids | _controls(files)
        spec = with_special(files.tokenizer, controls, self.vocab_size)
        later = without_dummy_prefix(spec)
        self._later = _build(later)
        self._has_dummy_prefix = later != spec
        self._first = _build(spec) if self._has_dummy_prefix else self._later
        self._added: dict[int, AddedToken] = self._later.get_added_tokens_decoder()
        self._special_ids = {t.content: i for i, t in self._added.items() if t.special and i < self.vocab_size}
        self.special_ids = frozenset(self._special_ids.values())
        self._bytes = token_bytes_table(spec, self._added, self.vocab_size)
        self._space_mark = space_mark(spec)
        # Chats send their system prompt and their earlier turns again with every request.
        self._encode_again = lru_cache(KEPT_TEXTS)(lambda text, first: tuple(self._encode(text, first)))
        self._lacking = lacking_bytes(self._bytes) if is_byte_level(spec) else frozenset()
        self.bos_id = _bos(files, self._later)
        declared_bos = token_named(files, "bos_token")
        self.bos_token_text = "" if declared_bos is None else self.token_text(declared_bos)
        self.pad_id = _pad(files, self.eos_ids, self.bos_id, self.vocab_size)

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Read `tokenizer.json` and what stands beside it. Raises BaseModelError."""
        files = TokenizerFiles.read(folder)
        try:
            return cls(files)
        except (KeyError, TypeError) as error:
            raise BaseModelError(f"{folder}/tokenizer.json lacks a part or has an unknown form: {error}") from error

    def encode(self, text: str, first: bool = False) -> list[int]:
        """Ids of ordinary text: no special token comes out, whatever `text` spells.

        `first`: the segment stands directly after bos (or at the start) and gets the tokenizer's own leading
        space; any later segment gets none, so that segments concatenate. Raises InvalidInput for a lone surrogate.
        """
        if not text:
            return []
        return list(self._encode_again(text, first)) if len(text) <= KEPT_CHARS else self._encode(text, first)

    def _encode(self, text: str, first: bool) -> list[int]:
        ids = self._encode_part(text, first)
        if b"".join(map(self.token_bytes, ids)) == text.encode():
            return ids
        # Rare: a merge spelt a control or byte token, the text holds the space mark itself, or a byte that the
        # vocabulary lacks. Or the tokenizer normalises (NFC): then there is nothing to mend.
        text = self.spellable(text)
        parts = self._risky.split(text) if self._risky else [text]
        careful: list[int] = []
        for part in parts:
            if part and part == self._space_mark:
                careful += [self._byte_ids[byte] for byte in part.encode()]
            elif part:
                # Cut behind its first character, no token's text can form.
                head, tail = (part[:1], part[1:]) if self._risky and self._risky.fullmatch(part) else (part, "")
                careful += self._encode_part(head, first and not careful)
                careful += self._encode_part(tail, False) if tail else []
        return careful

    def spellable(self, text: str) -> str:
        """`text` with U+FFFD for each character that the vocabulary has no bytes for; what `encode` encodes.

        SmolLM2's lacks six control characters and the unassigned planes 4 to 11; SentencePiece's lack nothing.
        """
        if not self._lacking:
            return text
        return "".join("\ufffd" if self._lacking & set(c.encode()) else c for c in text)

    def encode_with_specials(self, text: str, first: bool = False) -> list[int]:
        """Ids of a *trusted* text, such as a template's: special tokens spelt in it become their ids."""
        ids: list[int] = []
        position = 0
        for match in self._specials.finditer(text):
            ids += self.encode(text[position : match.start()], first and not position)
            ids.append(self._special_ids[match.group().strip()])
            position = match.end()
        # Directly after a leading bos the text is still the first of its sequence.
        starts = first and (not ids or ids == [self.bos_id])
        return ids + self.encode(text[position:], starts)

    def decode(self, ids: Iterable[int], first: bool = False) -> str:
        """The text of `ids`, exactly; special tokens have none. Bytes that are no UTF-8 show as U+FFFD.

        `first`: `ids` were encoded with `first=True`, so the dummy space is taken off again.
        """
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if first and self._has_dummy_prefix else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this id adds to the text; b"" for special tokens and for rows without a token."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """The vocabulary's own spelling, for logs: specials by name. Empty for a row without a token."""
        return self._later.id_to_token(token_id) or ""

    def id_of(self, token: str) -> int | None:
        """The id of a vocabulary entry or added token by its own spelling; None if there is none with a row."""
        found = self._later.token_to_id(token)
        return found if found is not None and found < self.vocab_size else None

    def spells_special(self, text: str) -> bool:
        """Whether a trusted text with this in it would yield a control token."""
        return self._specials.search(text) is not None

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which has no text."""
        return token_id in self.special_ids

    def _encode_part(self, text: str, first: bool) -> list[int]:
        try:
            encoding = (self._first if first else self._later).encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidInput("text holds a lone surrogate, which is no Unicode character") from error
        return list(encoding.ids)

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        """Byte -> id of its fallback token `<0xNN>`."""
        named = ((b, self.id_of(f"<0x{b:02X}>")) for b in range(256))
        return {byte: i for byte, i in named if i is not None}

    @cached_property
    def _risky(self) -> re.Pattern[str] | None:
        """Texts that a tokenizer may take for something else; captured, so that `split` keeps them."""
        texts = [re.escape(t) for t in sorted(self._special_ids, key=len, reverse=True) if len(t) > 1]
        if len(self._byte_ids) == 256:
            texts.append(r"<0x[0-9A-Fa-f]{2}>")
            if self._space_mark:
                texts.append(re.escape(self._space_mark))
        return re.compile(f"({'|'.join(texts)})") if texts else None

    @cached_property
    def _specials(self) -> re.Pattern[str]:
        """Special tokens with the white space that each swallows by its own `lstrip`/`rstrip`."""
        parts = [
            (r"\s*" if t.lstrip else "") + re.escape(t.content) + (r"\s*" if t.rstrip else "")
            for i, t in sorted(self._added.items(), key=lambda item: -len(item[1].content))
            if i in self.special_ids
        ]
        return re.compile("|".join(parts) if parts else r"(?!)")


def _build(spec: Json) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise BaseModelError(f"tokenizer.json is not a tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def _eos(files: TokenizerFiles) -> tuple[int, frozenset[int]]:
    """The eos that training appends, and all that end an answer."""
    listed = ids_named(files.generation_config, "eos_token_id") + ids_named(files.config, "eos_token_id")
    own = token_named(files, "eos_token")
    if own is None and not listed:
        raise BaseModelError("the tokenizer names no eos token: set eos_token in tokenizer_config.json")
    eos = own if own is not None else listed[0]
    return eos, frozenset((eos, *listed))


def _controls(files: TokenizerFiles) -> frozenset[int]:
    """Every id that the base's files call a control token."""
    fields = ("bos_token", "eos_token", "pad_token", "unk_token")
    named = [token_named(files, field) for field in fields]
    listed = ids_named(files.config, "bos_token_id") + ids_named(files.config, "pad_token_id")
    return frozenset(i for i in (*named, *listed) if i is not None)


def _bos(files: TokenizerFiles, tokenizer: Tokenizer) -> int | None:
    """The id that the tokenizer's own post-processor puts first, unless `add_bos_token` says otherwise."""
    own = token_named(files, "bos_token")
    declared = files.tokenizer_config.get("add_bos_token")
    if declared is not None:
        return own if declared else None
    ids = tokenizer.encode("").ids
    candidates = {own, *ids_named(files.config, "bos_token_id")}
    return ids[0] if ids and ids[0] in candidates else None


def _pad(files: TokenizerFiles, eos_ids: frozenset[int], bos_id: int | None, rows: int) -> int:
    """The declared pad if it has a row and is no eos, else unk, else the lowest id that controls nothing."""
    named = [token_named(files, "pad_token"), *ids_named(files.config, "pad_token_id")]
    for candidate in (*named, token_named(files, "unk_token")):
        if candidate is not None and 0 <= candidate < rows and candidate not in eos_ids:
            return candidate
    return next(i for i in range(rows) if i not in eos_ids and i != bos_id)
