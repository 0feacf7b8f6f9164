"""The exact bytes that each token adds to a text, by the rule of the tokenizer's kind. Knows nothing of prompts.

Byte-level BPE (GPT-2's) spells bytes as printable characters; SentencePiece marks spaces and has byte tokens `<0xNN>`.
"""

import re

from tokenizers import AddedToken

from onebase.tokenizer_files import Json, is_byte_level, space_mark, vocabulary

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes_table(spec: Json, added: dict[int, AddedToken], rows: int) -> list[bytes]:
    """Bytes of every id, by the rule of the tokenizer's kind (byte-level, or SentencePiece with byte tokens)."""
    table = [b""] * rows
    byte_of = _byte_alphabet() if is_byte_level(spec) else None
    mark = space_mark(spec)
    has_byte_tokens = bool(spec["model"].get("byte_fallback"))
    for token, i in vocabulary(spec).items():
        if i >= rows:
            continue
        if i in added:
            table[i] = b"" if added[i].special else added[i].content.encode()
        elif byte_of is not None:
            table[i] = b"".join(byte_of.get(char, char.encode()) for char in token)
        elif has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            table[i] = bytes.fromhex(match[1])
        else:
            table[i] = (token.replace(mark, " ") if mark else token).encode()
    return table


def lacking_bytes(table: list[bytes]) -> frozenset[int]:
    """Bytes without a token of their own: byte-level BPE drops them without a word."""
    single = {token for token in table if len(token) == 1}
    return frozenset(b for b in range(256) if bytes([b]) not in single)


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's map of printable characters to bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    pairs = [(chr(b), b) for b in printable] + [(chr(256 + n), b) for n, b in enumerate(others)]
    return {char: bytes([byte]) for char, byte in pairs}
