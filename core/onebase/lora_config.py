"""PEFT's `adapter_config.json` as far as serving needs it: ranks, scalings, and what can't be served exactly.

Keys that this version does not know are kept, never dropped. Resolution of `rank_pattern` and `alpha_pattern` is
PEFT's own (`peft.utils.other.get_pattern_key`), which tests/core/test_peft_parity.py holds against PEFT itself.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebase.errors import InvalidInput

MAX_CONFIG_BYTES = 4 << 20
MAX_PATTERN_CHARS = 500

# Initialisations that leave the base's weights as they are. All others fold something into the base.
BASE_PRESERVING_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

_SERVED_KEYS = {
    "use_dora": "DoRA rescales each output by the norm of base + adapter, which one frozen base can't share between "
    "adapters; merge it into a model of its own (onebase export FOLDER DEST --form merged) or retrain with "
    "use_dora=False",
    "lora_bias": "biases on lora_B are not served; retrain with lora_bias=False",
    "use_qalora": "QALoRA pools the layer's input; retrain with use_qalora=False",
    "alora_invocation_tokens": "aLoRA switches on in the middle of a prompt; retrain as plain LoRA",
    "layer_replication": "layer_replication changes the base's depth; train on the base as it is",
    "target_parameters": "target_parameters adapts bare parameters; target linear layers by target_modules",
    "trainable_token_indices": "trainable_token_indices changes embedding rows, and the base is shared and frozen",
    "modules_to_save": "modules_to_save replaces whole base layers, and the base is shared and frozen; retrain "
    "without it",
    "use_bdlora": "BD-LoRA's block-diagonal factors are not served; retrain as plain LoRA",
    "arrow_config": "Arrow routes between adapters; publish its experts as adapters of their own",
    "kasa_config": "KaSA truncates the base's own weights; retrain as plain LoRA",
    "monteclora_config": "MonteCLoRA samples its factors; retrain as plain LoRA",
}
# Quantified groups, doubled quantifiers and back references: what makes `re` take exponential time.
_EXPLOSIVE = re.compile(r"\)[*+?{]|[*+}][*+{]|\\\d")
_QUANTIFIER = re.compile(r"[*+{]")
MAX_QUANTIFIERS = 3
_PLAIN = re.compile(r"[A-Za-z0-9_.]+")


@dataclass(frozen=True, slots=True)
class LoraConfigData:
    """One adapter's LoRA settings under PEFT's names. `raw` is the whole file, unknown keys included."""

    r: int
    lora_alpha: float
    target_modules: tuple[str, ...] | str | None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        """The rank of one layer, by its path in the base (`model.layers.0.self_attn.q_proj`)."""
        return self.rank_pattern.get(_pattern_key(self.rank_pattern, module), self.r)

    def alpha(self, module: str) -> float:
        """The alpha of one layer."""
        return self.alpha_pattern.get(_pattern_key(self.alpha_pattern, module), self.lora_alpha)

    def scaling(self, module: str) -> float:
        """What B(A(x)) is multiplied with on one layer: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names the layer. A bare regex is not judged here (True)."""
        if self.target_modules is None or isinstance(self.target_modules, str):
            return True
        return any(module == name or module.endswith(f".{name}") for name in self.target_modules)

    def unservable(self) -> list[str]:
        """Why this adapter can't be served exactly; [] if it can."""
        problems = [f"{key}: {reason}" for key, reason in _SERVED_KEYS.items() if self.raw.get(key)]
        kind = self.raw.get("peft_type", "LORA")
        if kind != "LORA":
            problems.append(f"peft_type is {kind!r}; only LORA is served")
        task = self.raw.get("task_type")
        if task not in (None, "CAUSAL_LM"):
            problems.append(f"task_type is {task!r}; only CAUSAL_LM is served")
        if self.bias != "none":
            problems.append(f"bias is {self.bias!r}: it changes the base's own biases; retrain with bias='none'")
        if not any(self.init_lora_weights is ok or self.init_lora_weights == ok for ok in BASE_PRESERVING_INITS):
            problems.append(
                f"init_lora_weights is {self.init_lora_weights!r}, which changes the base's weights, so the adapter "
                "fits no other base: save it again in PEFT with save_pretrained(..., "
                "path_initial_model_for_weight_conversion=<folder of the initial adapter>), which makes it a plain LoRA"
            )
        return problems

    @classmethod
    def read(cls, path: Path) -> "LoraConfigData":
        """Raises InvalidInput naming the field that is wrong."""
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InvalidInput(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes", param="adapter")
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"{path.name} is not JSON: {error}", param="adapter") from error
        if not isinstance(raw, dict):
            raise InvalidInput(f"{path.name} must hold a JSON object", param="adapter")
        return cls.parse(raw)

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "LoraConfigData":
        """From the parsed JSON. Absent keys have PEFT's defaults. Raises InvalidInput with all wrong fields."""
        problems: list[str] = []
        r = raw.get("r", 8)
        alpha = raw.get("lora_alpha", 8)
        if not _is_rank(r):
            problems.append(f"r must be a whole number above 0, not {r!r}")
        if not _is_number(alpha):
            problems.append(f"lora_alpha must be a number, not {alpha!r}")
        ranks, alphas = raw.get("rank_pattern") or {}, raw.get("alpha_pattern") or {}
        problems += _pattern_problems("rank_pattern", ranks, _is_rank)
        problems += _pattern_problems("alpha_pattern", alphas, _is_number)
        targets = raw.get("target_modules")
        if not _is_targets(targets):
            problems.append(f"target_modules must be a list of names or one pattern, not {targets!r}")
        if problems:
            raise InvalidInput("adapter_config.json: " + "; ".join(problems), param="adapter")
        init = raw.get("init_lora_weights", True)
        name = raw.get("base_model_name_or_path")
        return cls(
            r=r,
            lora_alpha=alpha,
            target_modules=tuple(targets) if isinstance(targets, list) else targets,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            use_rslora=bool(raw.get("use_rslora", False)),
            use_dora=bool(raw.get("use_dora", False)),
            bias=str(raw.get("bias", "none")),
            init_lora_weights=init if isinstance(init, bool | str | None) else str(init),
            base_model_name_or_path=name if isinstance(name, str) and name else None,
            raw=raw,
        )


def _pattern_key(patterns: Mapping[str, object], module: str) -> str:
    """PEFT's rule: the first key that matches at the path's end wins; keys are regular expressions."""
    for key in patterns:
        if re.match(rf"(.*\.)?({key})$", module):
            return key
    return module


def _pattern_problems(field_name: str, value: object, is_value: Any) -> list[str]:
    """A pattern comes from a stranger's file and runs in the server: it must compile and can't be explosive."""
    if not isinstance(value, dict):
        return [f"{field_name} must be an object"]
    problems = []
    for key, item in value.items():
        if not is_value(item):
            problems.append(f"{field_name}[{key[:80]!r}] has the wrong value {item!r}")
        if _PLAIN.fullmatch(key):
            continue
        if len(key) > MAX_PATTERN_CHARS or _is_explosive(key):
            problems.append(f"{field_name}[{key[:80]!r}] is too complex a pattern")
            continue
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            problems.append(f"{field_name}[{key[:80]!r}] is not a pattern: {error}")
    return problems


def _is_explosive(pattern: str) -> bool:
    """Whether matching a layer's path could take long. Strict: layer names need no more than this allows."""
    return _EXPLOSIVE.search(pattern) is not None or len(_QUANTIFIER.findall(pattern)) > MAX_QUANTIFIERS


def _is_rank(value: object) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_targets(value: object) -> bool:
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    )
