"""A text file block by block: decoded, cut into chunks, or read as a JSON list. Memory does not grow with the file.

Line numbers count from 1. Knows nothing of records; what can't be read raises `BadText` with its line.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

_BLOCK: Final = 1 << 20
NOT_UTF8: Final = "not UTF-8 (byte 0x{:02x}); save the file as UTF-8"
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_NEAR_THE_END: Final = 16
"""A syntax error so near to a block's end may be an element cut in two: -Infinity and a pair of \\u escapes fit."""


class BadText(ValueError):
    """What is wrong, and the line it is wrong on."""

    def __init__(self, line: int, text: str) -> None:
        super().__init__(text)
        self.line, self.text = line, text


def text_blocks(path: Path) -> Iterator[str]:
    """The file's text in order: UTF-8, a byte order mark dropped, every end of line a newline. Raises BadText."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    line = 1
    with path.open("rb") as stream:
        while True:
            block = stream.read(_BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                raise BadText(line, NOT_UTF8.format(error.object[error.start])) from error
            line += block.count(b"\n")
            if text:
                yield text
            if not block:
                return


def chunks(blocks: Iterator[str], size: int, overlap: int) -> Iterator[tuple[int, str]]:
    """(line, chunk): `size` characters each, the first `overlap` of them those that ended the one before.

    The last chunk is what is left, and always holds something new: where the seed's loop ends, too.
    """
    text, line, step = "", 1, size - overlap
    for block in blocks:
        text += block
        start = 0
        while len(text) - start > size:
            yield line, text[start : start + size]
            line += text.count("\n", start, start + step)
            start += step
        text = text[start:]
    if text:
        yield line, text


def json_list(blocks: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """(line, element) of a JSON list. Raises BadText at the first syntax error: what follows is anyone's guess."""
    window = _Window(blocks)
    if window.next_character() != "[":
        raise BadText(window.line, "not a JSON list")
    window.advance(1)
    if window.next_character() == "]":
        return
    while True:
        line, value = window.element()
        yield line, value
        behind = window.next_character()
        window.advance(1)
        if behind == "]":
            break
        if behind != ",":
            raise BadText(window.line, "not JSON: a comma or ] is missing" if behind else "not JSON: the list has no ]")
        if window.next_character() == "]":
            raise BadText(window.line, "not JSON: a comma with no record behind it")
    if window.next_character():
        raise BadText(window.line, "not JSON: something stands behind the list")


class _Window:
    """The part of the text that is being read."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks = blocks
        self._text = ""
        self._at = 0
        self._ended = False
        self._decoder = json.JSONDecoder(parse_constant=no_constant)
        self.line = 1

    def advance(self, count: int) -> None:
        self.line += self._text.count("\n", self._at, self._at + count)
        self._at += count

    def next_character(self) -> str:
        """Of what is no white space; "" at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            self.advance(len(found.group()) if found else 0)
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_on()

    def element(self) -> tuple[int, Any]:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # at a block's end a number might go on
                    line = self.line
                    self.advance(end - self._at)
                    return line, value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_THE_END
                if self._ended or not cut:
                    self.advance(error.pos - self._at)
                    raise BadText(self.line, f"not JSON: {error.msg}") from error
            except RecursionError as error:
                raise BadText(self.line, "not JSON that can be read: nested too deeply") from error
            except ValueError as error:
                raise BadText(self.line, f"not JSON: {error}") from error
            self._read_on()

    def _read_on(self) -> None:
        """As much again as is held, so that a huge element is tried only a few times."""
        parts, size = [self._text[self._at :]], 0
        while not self._ended and size <= len(parts[0]):
            block = next(self._blocks, "")
            self._ended = not block
            parts.append(block)
            size += len(block)
        self._text, self._at = "".join(parts), 0


def no_constant(name: str) -> None:
    """For json's parse_constant: Python takes NaN and Infinity, JSON does not."""
    raise ValueError(f"{name} is not JSON")
