"""Translates the YAML files of georgesung/llm_qlora, key by key, into a recipe with the `seed` preset. No torch.

All keys of its five configs and of its raw-text example are known; an unknown one is an error here too. Where the
seed's behaviour was a defect, the translation mends it and says so in a notice.
"""

import re
from collections.abc import Mapping
from typing import Any, Final

from onebase.errors import RecipeError

_TOP: Final = frozenset(
    "model_name base_model model_family model_context_window data lora trainer "
    "trainer_output_dir model_output_dir".split()
)
_DATA: Final = {
    "vicuna": frozenset({"type", "dataset", "user_header", "response_header"}),
    "orca": frozenset({"type", "dataset", "system_header", "instruction_header", "response_header"}),
    "raw_text": frozenset({"type", "text_files", "chunk_char_len", "chunk_char_overlap", "chunk_prefix"}),
}
_LORA: Final = frozenset({"r", "lora_alpha", "target_modules", "lora_dropout", "bias", "task_type"})
_TRAINER: Final = frozenset(
    "batch_size gradient_accumulation_steps warmup_steps num_train_epochs learning_rate logging_steps".split()
)


SEED_NAMES: Final = {
    "name": "model_name",
    "base": "base_model",
    "data.max_tokens": "model_context_window",
    "data.train": "data.text_files",
    "data.train.0.path": "data.dataset",
    "data.headers.user": "data.user_header",
    "data.headers.response": "data.response_header",
    "data.headers.system": "data.system_header",
    "data.chunk_chars": "data.chunk_char_len",
    "data.chunk_overlap": "data.chunk_char_overlap",
    "lora.alpha": "lora.lora_alpha",
    "lora.dropout": "lora.lora_dropout",
    "train.warmup": "trainer.warmup_steps",
    "train.epochs": "trainer.num_train_epochs",
    "train.learning_rate": "trainer.learning_rate",
    "train.log_every": "trainer.logging_steps",
    "train.batch_size": "trainer.batch_size",
}
"""Our key -> the seed's, for errors about a translated file."""


def is_seed_config(content: Mapping[str, Any]) -> bool:
    return "base_model" in content and "model_name" in content


def translate_seed_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain values. Raises RecipeError for keys that the seed never had, or a missing one."""
    _refuse_unknown("", content, _TOP)
    data = _section(content, "data")
    kind = data.get("type")
    if not isinstance(kind, str) or kind not in _DATA:
        raise RecipeError(f"data.type: must be one of {', '.join(_DATA)}, not {kind!r}", param="data.type")
    _refuse_unknown("data.", data, _DATA[kind])
    notices = ["the seed trained with fp16 on a bf16 base; here both are bf16 (fp16 overflows)"]
    if str(content.get("model_family", "")).lower() not in ("", "llama"):
        notices.append(f"model_family: {content['model_family']} is read from the base's config.json instead")
    translated_data = _translate_data(data, kind)
    window = content.get("model_context_window")
    if window is not None:
        translated_data["max_tokens"] = window
    return {
        "name": _adapter_name(str(content["model_name"])),
        "base": content["base_model"],
        "preset": "seed",
        "data": translated_data,
        "lora": _translate_lora(_section(content, "lora")),
        "train": _translate_trainer(_section(content, "trainer")),
        "notices": notices,
    }


def _translate_data(data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    if kind == "raw_text":
        files = _need(data, "data.", "text_files")
        files = [files] if isinstance(files, str) else files
        if not isinstance(files, list) or not files or not all(isinstance(path, str) for path in files):
            raise RecipeError("data.text_files: must be a list of files", param="data.text_files")
        return {
            "train": [{"path": path, "format": "text"} for path in files],
            "chunk_chars": _need(data, "data.", "chunk_char_len"),
            "chunk_overlap": _need(data, "data.", "chunk_char_overlap"),
            "chunk_prefix": data.get("chunk_prefix", ""),
        }
    source = _need(data, "data.", "dataset")
    user = "user_header" if kind == "vicuna" else "instruction_header"
    headers: dict[str, Any] = {
        "user": _need(data, "data.", user),
        "response": _need(data, "data.", "response_header"),
    }
    if kind == "orca":
        headers |= {"system": _need(data, "data.", "system_header"), "after_eos": "\n"}
    return {
        "train": [{"path": source, "format": "sharegpt" if kind == "vicuna" else "orca"}],
        "headers": headers,
    }


def _translate_lora(lora: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown("lora.", lora, _LORA)
    if lora.get("bias", "none") != "none":
        raise RecipeError("lora.bias: only none can be served on a shared base", param="lora.bias")
    if lora.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise RecipeError("lora.task_type: only CAUSAL_LM", param="lora.task_type")
    names = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
    return {ours: lora[theirs] for theirs, ours in names.items() if theirs in lora}


def _translate_trainer(trainer: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_unknown("trainer.", trainer, _TRAINER)
    names = {
        "warmup_steps": "warmup",
        "num_train_epochs": "epochs",
        "learning_rate": "learning_rate",
        "logging_steps": "log_every",
    }
    translated = {ours: trainer[theirs] for theirs, ours in names.items() if theirs in trainer}
    return translated | {
        "batch_size": _whole(trainer, "batch_size", 1) * _whole(trainer, "gradient_accumulation_steps", 4)
    }


def _whole(trainer: Mapping[str, Any], key: str, default: int) -> int:
    value = trainer.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RecipeError(f"trainer.{key}: must be a whole number from 1 on, not {value!r}", param=f"trainer.{key}")
    return value


def _adapter_name(model_name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", model_name.lower()).strip("-._")[:64] or "adapter"


def _section(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = content.get(name)
    if not isinstance(section, Mapping):
        raise RecipeError(f"{name}: missing", param=name)
    return section


def _need(section: Mapping[str, Any], prefix: str, key: str) -> Any:
    if key not in section:
        raise RecipeError(f"{prefix}{key}: missing", param=f"{prefix}{key}")
    return section[key]


def _refuse_unknown(prefix: str, section: Mapping[str, Any], known: frozenset[str]) -> None:
    unknown = sorted(set(section) - known)
    if unknown:
        raise RecipeError(
            f"{prefix}{unknown[0]}: the seed's configs have no such key; known are {', '.join(sorted(known))}",
            param=f"{prefix}{unknown[0]}",
        )
