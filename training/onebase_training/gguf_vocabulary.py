"""A base's tokenizer.json in GGUF's terms. Refuses what llama.cpp would split in another way than the trainer did."""

import json
from collections.abc import Mapping
from typing import Any, Final

import gguf

from onebase.bases import BaseSpec
from onebase.errors import BaseModelError
from onebase.tokenizer import TextTokenizer

_LLAMA3: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
_QWEN2: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?"


def add_vocabulary(writer: Any, spec: BaseSpec) -> None:
    """Tokens, their kinds, merges or scores, special ids. Raises BaseModelError for an unknown kind of tokenizer."""
    tokenizer = TextTokenizer.load(spec.path)
    content: dict[str, Any] = json.loads((spec.path / "tokenizer.json").read_text("utf-8"))
    model = content["model"]
    if model.get("type") != "BPE":
        raise BaseModelError(f"base {spec.id}: a tokenizer of kind {model.get('type')} is not written as GGUF here")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    added = {int(token["id"]): token for token in content.get("added_tokens", ())}
    tokens, kinds = _tokens(model, added, spec.vocab_size)
    for special in (*tokenizer.eos_ids, tokenizer.bos_id):
        if special is not None:
            kinds[special] = int(gguf.TokenType.CONTROL)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_has_dummy_space(content))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(content, spec))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    named = tokenizer.bos_id if tokenizer.bos_id is not None else spec.config.get("bos_token_id")
    if isinstance(named, int):  # SmolLM2 and Qwen name one and never add it
        writer.add_bos_token_id(named)


def _tokens(model: Mapping[str, Any], added: Mapping[int, Any], rows: int) -> tuple[list[str], list[int]]:
    """One token for each row of the embedding; rows without one get a name of their own."""
    by_id = {number: token for token, number in model["vocab"].items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    tokens = [by_id.get(number, f"[UNUSED{number}]") for number in range(rows)]
    kinds = [int(gguf.TokenType.NORMAL if number in by_id else gguf.TokenType.UNUSED) for number in range(rows)]
    for number, token in enumerate(tokens):
        if model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = int(gguf.TokenType.BYTE)
        if token == model.get("unk_token"):
            kinds[number] = int(gguf.TokenType.UNKNOWN)
        elif number in added:
            kinds[number] = int(gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges what scores highest: a token scores by the place of the merge that makes it."""
    place: dict[str, int] = {}
    for number, merge in enumerate(merges):
        place.setdefault(merge.replace(" ", "", 1), number)
    last = len(merges)
    return [-float(place.get(token, last)) for token in tokens]


def _has_dummy_space(content: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front: said by the normaliser (legacy) or by the Metaspace step."""
    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    before = content.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or before.get("prepend_scheme") in ("first", "always")


def _splitting(content: Mapping[str, Any], spec: BaseSpec) -> str:
    """llama.cpp's word for how text is split before merging."""
    before = content.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    patterns = [str(step.get("pattern", {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    for start, word in ((_LLAMA3, "llama-bpe"), (_QWEN2, "qwen2")):
        if any(pattern.startswith(start) for pattern in patterns):
            return word
    raise BaseModelError(
        f"base {spec.id}: llama.cpp has no name for how its tokenizer splits text; --form merged works"
    )
