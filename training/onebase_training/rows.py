"""Records -> rows of token ids with a mask, by the renderer that also serves. No torch.

A row is one training example. The mask is made by position while rendering, never by searching for tokens, so it
holds whatever the text spells and whatever the pad id is.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from onebase.bases import BaseSpec
from onebase.prompt import PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer
from onebase_training.config import Headers, Recipe
from onebase_training.records import Conversation, PlainText, Record


@dataclass(frozen=True, slots=True)
class Row:
    """`ids` [n] int32; `learnt` [n] bool, True on the tokens whose prediction is learnt; never on the first.

    `skipped` counts answers that the format could not render as they would be generated: they are not learnt.
    """

    ids: NDArray[np.int32]
    learnt: NDArray[np.bool_]
    skipped: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        return int(self.learnt.sum())

    @property
    def key(self) -> bytes:
        """Equal for equal rows, and nothing else: for finding duplicates."""
        return hashlib.blake2b(self.ids.tobytes() + self.learnt.tobytes(), digest_size=16).digest()

    @property
    def place(self) -> bytes:
        """Where the row stands in the fixed split: a hash of its text alone, whatever of it is learnt."""
        return hashlib.blake2b(self.ids.tobytes(), digest_size=16).digest()

    def all_learnt(self) -> "Row":
        """The seed's loss: every token but the first, which nothing predicts."""
        learnt = np.ones(len(self.ids), bool)
        learnt[:1] = False
        return Row(self.ids, learnt)

    def answers(self) -> list[tuple[int, int]]:
        """The learnt spans [start, end): what stands before one is the prompt that it answers."""
        edges = np.diff(np.concatenate(([0], self.learnt.astype(np.int8), [0])))
        return [(int(a), int(b)) for a, b in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)]


class Encoder:
    """Renders records with one tokenizer and format, the mask on the answers and their eos."""

    def __init__(self, tokenizer: TextTokenizer, renderer: PromptRenderer, *, headers: Headers | None = None) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._headers = headers

    def encode(self, record: Record) -> Row:
        """Raises InvalidInput for text that can't be encoded. The mask may be empty; the caller drops such rows."""
        if isinstance(record, PlainText):
            return self._row(*self._plain(record.text))
        if self._headers is not None or record.unknown:
            return self._row(*self._seed(record))
        example = self._renderer.render_example(record.messages, record.tools)
        row = self._row(example.ids, example.mask)
        return replace(row, skipped=len(example.skipped)) if example.skipped else row

    def _plain(self, text: str) -> tuple[list[int], list[bool]]:
        """A chunk of a text has no end, so it gets no eos (as in the seed)."""
        bos = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        ids = bos + self._tokenizer.encode(text, True)
        return ids, [True] * len(ids)

    def _seed(self, record: Conversation) -> tuple[list[int], list[bool]]:
        ids = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        mask = [False] * len(ids)
        first = True
        for segment in seed_segments(record, self._headers):
            piece = self._tokenizer.encode(segment.text, first)
            if segment.ends:
                piece = [*piece, self._tokenizer.eos_id]
            ids += piece
            mask += [segment.learnt] * len(piece)
            first = False
        return ids, mask

    def _row(self, ids: Sequence[int], mask: Sequence[bool]) -> Row:
        learnt = np.asarray(mask, bool).copy()
        if len(learnt):
            learnt[0] = False
        return Row(np.asarray(ids, np.int32), learnt)


def make_renderer(recipe: Recipe, spec: BaseSpec, tokenizer: TextTokenizer) -> PromptRenderer:
    """Of the recipe's prompt format. Raises InvalidInput where that is the base's own template and it has none."""
    template = spec.path / "chat_template.jinja"
    return get_renderer(
        recipe.data.prompt_format,
        tokenizer,
        template.read_text("utf-8") if template.is_file() else None,
    )


@dataclass(frozen=True, slots=True)
class Segment:
    """A text that is encoded on its own. `ends`: an eos id follows."""

    text: str
    learnt: bool = False
    ends: bool = False


def seed_segments(record: Conversation, headers: Headers | None) -> list[Segment]:
    """The seed's string in pieces, with its own headers (VicunaDataProcessor.py, OrcaDataProcessor.py).

    Vicuna: `{user}{text}\\n\\n{response}{text}{eos}\\n\\n`; Orca the same with a system part and one newline after eos.
    """
    headers = headers or Headers(user=default_header("user"), response=default_header("assistant"))
    unknown = dict(record.unknown)
    segments: list[Segment] = []
    for index, message in enumerate(record.messages):
        if index in unknown:
            segments += [Segment(f"### {unknown[index].upper()}:\n"), Segment(message.content), Segment("\n\n")]
        elif message.role == "assistant":
            segments.append(Segment(headers.response))
            segments.append(Segment(message.content, learnt=message.is_supervised, ends=True))
            segments.append(Segment(headers.after_eos))
        else:
            header = headers.user if message.role == "user" else headers.system or default_header("system")
            segments += [Segment(header), Segment(message.content), Segment("\n\n")]
    return segments


def seed_text(record: Conversation, headers: Headers | None, eos: str) -> str:
    """The seed's exact string, for golden tests; eos spelt out, bos left to the tokenizer."""
    return "".join(segment.text + (eos if segment.ends else "") for segment in seed_segments(record, headers))


def default_header(role: str) -> str:
    """The format's own header, which only core's prompt module spells."""
    from onebase import prompt

    return {"system": prompt.SYSTEM, "user": prompt.HUMAN, "assistant": prompt.RESPONSE}[role]


def cut_to_turns(row: Row, limit: int) -> Row | None:
    """The row's longest beginning of at most `limit` tokens that ends behind a whole answer; None if none fits."""
    learnt = row.learnt[:limit]
    if not learnt.any():
        return None
    following = row.learnt[1 : limit + 1]
    ends = np.flatnonzero(learnt[: len(following)] & ~following)
    if not len(ends):
        return None
    end = int(ends[-1]) + 1
    return Row(row.ids[:end], row.learnt[:end])
