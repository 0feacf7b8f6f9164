"""Text is exact whatever the tokens' borders: no half characters, no stop strings, no lost or doubled bytes."""

import codecs
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from onebase_server.engine.detokenizer import Detokenizer, TokenTable
from onebase_server.engine.types import TokenLogprob

alphabet = st.sampled_from(["a", "b", "ab", "#", "\n", "é", "漢", "🙂", "👩‍🚀", "�", " "])
texts = st.lists(alphabet, max_size=30).map("".join)
stop_strings = st.lists(st.lists(alphabet, min_size=1, max_size=4).map("".join), max_size=3).map(tuple)


class PieceTokenizer:
    """Token i has the i-th piece's bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self.vocab_size = len(pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def split(raw: bytes, cuts: list[int]) -> list[bytes]:
    borders = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    pieces = [raw[begin:end] for begin, end in pairwise(borders)]
    return [piece for piece in pieces if piece] or [b""]


def run(
    pieces: list[bytes], stops: tuple[str, ...] = (), min_tokens: int = 0, flush: bool = True
) -> tuple[list[str], list[int], bool]:
    """Emitted texts, emitted tokens, and whether a stop string ended it."""
    detokenizer = Detokenizer(TokenTable(PieceTokenizer(pieces)), stops)
    out: list[str] = []
    ids: list[int] = []
    stopped = False
    for token in range(len(pieces)):
        stopped = detokenizer.push(token, check_stops=token + 1 > min_tokens)
        if not stopped and token == len(pieces) - 1 and flush:
            detokenizer.flush()
        text, token_ids, _ = detokenizer.take()
        out.append(text)
        ids.extend(token_ids)
        if stopped:
            break
    return out, ids, stopped


def cut_at_stop(text: str, stops: tuple[str, ...]) -> str | None:
    """Text before the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return None


@given(text=texts, cuts=st.lists(st.integers(0, 200)))
def test_text_is_whole_however_its_bytes_are_split(text: str, cuts: list[int]) -> None:
    pieces = split(text.encode(), cuts)
    out, ids, _ = run(pieces)
    assert "".join(out) == text
    assert ids == list(range(len(pieces)))


@given(text=texts, cuts=st.lists(st.integers(0, 200)), stops=stop_strings)
@settings(max_examples=200)
def test_a_stop_string_ends_the_text_exactly_before_it_however_tokens_split_it(
    text: str, cuts: list[int], stops: tuple[str, ...]
) -> None:
    out, _, stopped = run(split(text.encode(), cuts), stops)
    cut = cut_at_stop(text, stops)
    assert stopped == (cut is not None)
    assert "".join(out) == (text if cut is None else cut)


@given(text=texts, cuts=st.lists(st.integers(0, 200)), stops=stop_strings)
def test_what_is_out_before_the_end_can_never_become_part_of_a_stop_string(
    text: str, cuts: list[int], stops: tuple[str, ...]
) -> None:
    out, _, stopped = run(split(text.encode(), cuts), stops, flush=False)
    said = "".join(out)
    held = text[len(said) :]
    if not stopped:
        assert text.startswith(said)
        assert held == "" or any(stop.startswith(held) for stop in stops)
        assert not any(
            text[position:] == stop[: len(text) - position] for stop in stops for position in range(len(said))
        )


@given(raw=st.binary(max_size=30), cuts=st.lists(st.integers(0, 60)))
def test_bytes_that_are_no_text_become_replacement_characters_and_an_unfinished_end_is_dropped(
    raw: bytes, cuts: list[int]
) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    out, _, _ = run(split(raw, cuts))
    assert "".join(out) == decoder.decode(raw)


@given(text=texts.filter(bool), cuts=st.lists(st.integers(0, 200)), stops=stop_strings)
def test_tokens_come_out_with_their_text_and_those_of_the_stop_string_do_not(
    text: str, cuts: list[int], stops: tuple[str, ...]
) -> None:
    pieces = split(text.encode(), cuts)
    out, ids, stopped = run(pieces, stops)
    said = "".join(out).encode()
    assert ids == list(range(len(ids)))
    kept = b"".join(pieces[token] for token in ids)
    if not stopped:
        assert kept == text.encode()
    else:
        # Whole tokens: at most the one that holds both text and the beginning of the stop string reaches further.
        assert kept.startswith(said)
        assert (
            b"".join(pieces[token] for token in ids[:-1]).startswith(said[: len(kept)]) is False
            or kept == said
            or (len(b"".join(pieces[token] for token in ids[:-1])) < len(said))
        )


def test_logprobs_stay_with_their_tokens_while_text_is_held() -> None:
    detokenizer = Detokenizer(TokenTable(PieceTokenizer([b"x", b"\n##", b"# no", b"\n###", b" H"])), ("\n### H",))
    taken = []
    for token in range(5):
        detokenizer.push(token, TokenLogprob(token, -float(token)))
        taken.append(detokenizer.take())
    assert [text for text, _, _ in taken] == ["x", "", "\n### no", "", ""]
    assert [ids for _, ids, _ in taken] == [(0,), (), (1, 2), (), ()]
    assert [[entry.token_id for entry in logprobs] for _, _, logprobs in taken] == [[0], [], [1, 2], [], []]


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens_tokens() -> None:
    out, _, stopped = run([b"a", b"b", b"ab", b"c"], ("ab",), min_tokens=2)
    assert ("".join(out), stopped) == ("ab", True)
    out, _, stopped = run([b"a", b"b", b"c"], ("ab",), min_tokens=1)
    assert ("".join(out), stopped) == ("abc", False)


def test_control_tokens_have_no_text_and_ids_past_the_vocabulary_neither() -> None:
    detokenizer = Detokenizer(TokenTable(PieceTokenizer([b"hi", b""])))
    for token in (0, 1, 7):
        detokenizer.push(token)
    assert detokenizer.take() == ("hi", (0, 1, 7), ())
