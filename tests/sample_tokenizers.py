"""Two real kinds of tokenizer as folders that `TextTokenizer.load` reads, without torch or transformers.

SmolLM2's (byte-level BPE, names a bos that it never adds) lies compressed under tests/core/data. The other is trained
here in a second by SentencePiece: OpenLLaMA's kind, with bos, byte fallback and the legacy dummy space.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import sentencepiece

DATA = Path(__file__).parent / "core/data"
MARK = "\u2581"

LLAMA2_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ '[TOOL] ' + m.content + ' [/TOOL]' }}{% endif %}"
    "{% endfor %}"
)

_CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "### HUMAN: ### RESPONSE: ### SYSTEM: Hello, how are you today?",
    "I am fine, thank you. What can I do for you?",
    "A base model, many adapters: train, serve and swap them.",
    "Numbers like 1234567890 and signs (), [], {}, <>, /, |, =, + are here as well.",
    "  two leading spaces,  two between  words, and a tab\there",
    "</s> is the end </s> of <s> a text",
    "Grüße aus Köln, naïve café, señor",
] * 40


def smollm2_folder(dest: Path) -> Path:
    """The embedded base's tokenizer."""
    dest.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer_config.json", "config.json", "chat_template.jinja"):
        shutil.copy(DATA / "smollm2" / file, dest / file)
    packed = (DATA / "smollm2/tokenizer.json.gz").read_bytes()
    (dest / "tokenizer.json").write_bytes(gzip.decompress(packed))
    return dest


def train_sentencepiece(dest: Path, vocab_size: int = 700) -> sentencepiece.SentencePieceProcessor:
    """A Llama-like SentencePiece model trained on a few lines; SentencePiece itself, to compare with."""
    dest.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS),
        model_prefix=str(dest / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(dest / "tokenizer.model"))


def sentencepiece_folder(dest: Path, *, metaspace: bool = False) -> Path:
    """That model in the form that transformers converts it to: legacy (a Prepend normalizer) or newer (Metaspace)."""
    model = train_sentencepiece(dest)
    pieces = [model.id_to_piece(i) for i in range(model.get_piece_size())]
    scores = [model.get_score(i) for i in range(model.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, pieces[i], special=pieces[i] != "</s>") for i in range(3)],
        "normalizer": None if metaspace else _legacy_normalizer(),
        "pre_tokenizer": _metaspace() if metaspace else None,
        "post_processor": _bos_first("<s>", vocab["<s>"]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(vocab, scores),
        },
    }
    (dest / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (dest / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    (dest / "config.json").write_text(json.dumps({"vocab_size": len(vocab), "eos_token_id": 2, "bos_token_id": 1}))
    (dest / "chat_template.jinja").write_text(LLAMA2_TEMPLATE)
    return dest


def _added(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


def _legacy_normalizer() -> dict[str, Any]:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    return {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": MARK}, replace]}


def _metaspace() -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "first", "split": False}


def _bos_first(token: str, token_id: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _merges(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """transformers' rule: every split of a piece into two pieces, best piece first. Control pieces are not spared here:
    old conversions did not spare them either, and then the text `</s>` can merge into the control token."""
    found = [
        (-scores[i], i, vocab[piece[:cut]], vocab[piece[cut:]])
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    names = {i: piece for piece, i in vocab.items()}
    return [[names[left], names[right]] for _, _, left, right in sorted(found)]
