"""A SentencePiece BPE model -> `tokenizer.json` that gives SentencePiece's own ids.

transformers 5 converts too, but drops the dummy space before leading spaces, the bos, and the rule that collapses
spaces (OpenLLaMA v1 has it; transformers #24233), so a base's old adapters and its authors' ids would not match.
tests/core/test_base_convert.py holds this against SentencePiece itself. No torch.
"""

import base64
import json
from pathlib import Path
from typing import Any, Final

from onebase.errors import BaseModelError

_MARK: Final = "\u2581"
_BPE: Final = 2
_CONTROL: Final = (2, 3)  # unknown and control pieces, in sentencepiece_model.proto's numbers
_USER_DEFINED: Final = 4


def convert_sentencepiece(folder: Path) -> None:
    """Write `tokenizer.json` from `tokenizer.model` where there is none, and name the specials in the config."""
    source = folder / "tokenizer.model"
    if (folder / "tokenizer.json").is_file() or not source.is_file():
        return
    model = _read(source)
    if model.trainer_spec.model_type != _BPE:
        raise BaseModelError(f"{source} is not a BPE model; onebase reads SentencePiece's BPE only", param="base")
    pieces = [piece.piece for piece in model.pieces]
    config = _tokenizer_config(folder, model, pieces)
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(number, piece.piece, special=piece.type in _CONTROL)
            for number, piece in enumerate(model.pieces)
            if piece.type in (*_CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": _post_processor(config, pieces),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.trainer_spec.unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(model.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": _merges(model),
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _read(source: Path) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(source.read_bytes())
    except Exception as error:
        raise BaseModelError(f"{source} is not a SentencePiece model: {error}", param="base") from error
    return model


def _normalizers(spec: Any) -> list[dict[str, Any]]:
    """SentencePiece's own order: its character map, spaces collapsed, the dummy space, spaces as marks."""
    steps: list[dict[str, Any]] = []
    if spec.precompiled_charsmap:
        steps.append(
            {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec.precompiled_charsmap).decode()}
        )
    if spec.remove_extra_whitespaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _MARK})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _MARK})
    return steps


def _tokenizer_config(folder: Path, model: Any, pieces: list[str]) -> dict[str, Any]:
    """What the authors' file says, and the model's own names where it says nothing. A Llama puts bos first."""
    file = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    trainer = model.trainer_spec
    for name, number in (("bos_token", trainer.bos_id), ("eos_token", trainer.eos_id), ("unk_token", trainer.unk_id)):
        if not config.get(name) and 0 <= number < len(pieces):
            config[name] = pieces[number]
    config.setdefault("add_bos_token", True)
    config.setdefault("add_eos_token", False)
    return config


def _post_processor(config: dict[str, Any], pieces: list[str]) -> dict[str, Any] | None:
    token = config.get("bos_token")
    name = token["content"] if isinstance(token, dict) else token
    if not config["add_bos_token"] or name not in pieces:
        return None
    special = {"SpecialToken": {"id": name, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [pieces.index(name)], "tokens": [name]}},
    }


def _added(number: int, content: str, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": content, "special": special, **flags}


def _merges(model: Any) -> list[list[str]]:
    """Every split of an ordinary piece into two pieces, best score first: SentencePiece merges by score alone."""
    ordinary = {p.piece: (p.score, number) for number, p in enumerate(model.pieces) if p.type == 1}
    found = [
        (-score, number, ordinary[piece[:cut]][1], ordinary[piece[cut:]][1])
        for piece, (score, number) in ordinary.items()
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]
    names = {number: piece for piece, (_, number) in ordinary.items()}
    return [[names[left], names[right]] for _, _, left, right in sorted(found)]
