"""A version's files: read them without loading a tensor, say everything that is wrong with them, name their content.

PEFT's own `adapter_config.json` + `adapter_model.safetensors`, and our manifest `onebase.json`, which a folder from
elsewhere lacks. Where versions lie and which is current is the store's business; no torch here.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from onebase.errors import AdapterInvalid, InvalidInput
from onebase.lora_config import LoraConfigData
from onebase.manifest import BaseIdentity, Manifest
from onebase.safetensors_header import SafetensorsHeader, TensorInfo, read_header

__all__ = ["AdapterFiles", "BaseIdentity", "LoraConfigData", "Manifest", "check_base", "digest", "validate_adapter"]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "onebase.json"
SERVED_DTYPES = ("F32", "F16", "BF16")

_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter folder, read: settings and the header of the weights. `manifest` is None if the folder has none."""

    path: Path
    config: LoraConfigData
    header: SafetensorsHeader
    manifest: Manifest | None

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.header.tensors

    @property
    def shape_key(self) -> tuple[bytes, str]:
        """Equal for folders whose settings and tensors (names, shapes, places) are the same: what has been checked
        or planned for one of them holds for all, save who the base is."""
        return self.header.digest, repr(self.config.raw)

    @classmethod
    def read(cls, path: Path) -> "AdapterFiles":
        """Raises AdapterInvalid with every file that is missing, broken or of a refused kind."""
        problems: list[str] = []
        config: LoraConfigData | None = None
        header: SafetensorsHeader | None = None
        manifest: Manifest | None = None
        if not path.is_dir():
            raise AdapterInvalid(str(path), ["it is not a folder"])
        try:
            config = LoraConfigData.read(path / CONFIG)
        except FileNotFoundError:
            problems.append(f"{CONFIG} is missing")
        except InvalidInput as error:
            problems.append(error.message)
        try:
            header = read_header(path / WEIGHTS)
        except FileNotFoundError:
            problems.append(_missing_weights(path))
        except InvalidInput as error:
            problems.append(error.message)
        try:
            manifest = Manifest.read(path / MANIFEST)
        except FileNotFoundError:
            pass  # a folder that PEFT wrote has none
        except InvalidInput as error:
            problems.append(error.message)
        if problems or config is None or header is None:
            raise AdapterInvalid(str(path), problems)
        return cls(path, config, header, manifest)

    def modules(self) -> dict[str, dict[str, TensorInfo]]:
        """Layer path in the base -> {"A": ..., "B": ...}, as far as the tensor names are LoRA's."""
        found: dict[str, dict[str, TensorInfo]] = {}
        for key, tensor in self.tensors.items():
            if match := _KEY.fullmatch(key):
                found.setdefault(match["module"], {})[match["side"]] = tensor
        return found


def _missing_weights(path: Path) -> str:
    pickles = sorted(p.name for pattern in _PICKLES for p in path.glob(pattern) if p.name != "training_args.bin")
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code when loaded, and is refused; load it once in PEFT and "
            "save_pretrained() it, which writes safetensors"
        )
    return f"{WEIGHTS} is missing"


def validate_adapter(
    files: AdapterFiles,
    base_shapes: Mapping[str, tuple[int, int]] | None,
    base: BaseIdentity | None,
    *,
    same_base: bool = False,
) -> None:
    """Check that the adapter can be served exactly on this base. Raises AdapterInvalid with ALL problems.

    `base_shapes`: linear layer path -> (out, in) of the base; None leaves names and sizes unchecked. `base`: who the
    base is; None leaves that unchecked. `same_base`: the caller vouches that the names mean the same base.
    Whether values are finite, whoever loads the tensors must check.
    """
    problems = files.config.unservable()
    if base is not None and not same_base:
        problems += _base_problems(files, base)
    problems += _name_problems(files)
    for module, pair in sorted(files.modules().items()):
        problems += _pair_problems(files.config, module, pair, base_shapes)
    if not files.tensors:
        problems.append("it holds no tensors")
    if problems:
        raise AdapterInvalid(str(files.path), problems)


def check_base(files: AdapterFiles, base: BaseIdentity | None) -> None:
    """The part of `validate_adapter` that does not follow from `shape_key`. Raises AdapterInvalid."""
    problems = _base_problems(files, base) if base is not None else []
    if problems:
        raise AdapterInvalid(str(files.path), problems)


def _name_problems(files: AdapterFiles) -> list[str]:
    """One text for each tensor that is not lora_A or lora_B of a module."""
    problems = []
    for key in sorted(files.tensors):
        if _KEY.fullmatch(key):
            continue
        shown = repr(key[:120])
        if "lora_magnitude_vector" in key:
            problems.append(f"tensor {shown} belongs to DoRA, which is not served")
        elif "embed_tokens" in key or "lm_head" in key or "lora_embedding" in key:
            problems.append(
                f"tensor {shown} changes the embedding or lm_head, and the base is frozen; save in PEFT with "
                "save_embedding_layers=False and never resize the vocabulary"
            )
        elif ".modules_to_save." in key or ".original_module." in key:
            problems.append(
                f"tensor {shown} replaces a base layer (modules_to_save), and the base is shared and frozen"
            )
        elif key.endswith(".bias"):
            problems.append(f"tensor {shown} is a bias, which is not served")
        else:
            problems.append(f"tensor {shown} is no LoRA tensor of PEFT (base_model.model.<layer>.lora_A.weight)")
    return problems


def _pair_problems(
    config: LoraConfigData,
    module: str,
    pair: Mapping[str, TensorInfo],
    base_shapes: Mapping[str, tuple[int, int]] | None,
) -> list[str]:
    """What is wrong with one layer's lora_A [r, in] and lora_B [out, r]."""
    if base_shapes is not None and module not in base_shapes:
        if module.endswith(("lm_head", "embed_tokens")):
            return [f"{module}: LoRA on the embedding or lm_head is not served"]
        return [f"{module}: the base has no such linear layer"]
    rank = config.rank(module)
    out, into = base_shapes[module] if base_shapes is not None else (None, None)
    problems = []
    if not config.targets(module):
        problems.append(f"{module}: target_modules does not name it, so PEFT would ignore its tensors")
    for side, expected in (("A", (rank, into)), ("B", (out, rank))):
        if side not in pair:
            problems.append(f"{module}: lora_{side} is missing")
            continue
        shape, dtype = pair[side].shape, pair[side].dtype
        if dtype not in SERVED_DTYPES:
            problems.append(f"{module}: lora_{side} has dtype {dtype}; served are {', '.join(SERVED_DTYPES)}")
        if len(shape) != 2 or any(want not in (None, got) for got, want in zip(shape, expected, strict=False)):
            wanted = ", ".join("?" if size is None else str(size) for size in expected)
            problems.append(f"{module}: lora_{side} has shape {list(shape)}, expected [{wanted}] (rank {rank})")
    return problems


def _base_problems(files: AdapterFiles, base: BaseIdentity) -> list[str]:
    """Whether the adapter says that it was trained on another base."""
    manifest = files.manifest
    if manifest is not None and manifest.base.config_hash and base.config_hash:
        if manifest.base.config_hash != base.config_hash:
            return [
                f"it was trained on base {manifest.base.id} (config {manifest.base.config_hash[:12]}), this server "
                f"holds {base.id} (config {base.config_hash[:12]})"
            ]
        trained_on: str | None = manifest.base.id
        if any((identity.revision or "").startswith("local-") for identity in (manifest.base, base)):
            return []  # a local folder's name says nothing; the hash has spoken
    else:
        trained_on = files.config.base_model_name_or_path
    if trained_on is None or _is_folder(trained_on) or _is_folder(base.id):
        return []
    if _plain_name(trained_on) == _plain_name(base.id):
        return []
    return [f"it names {trained_on} as its base, this one is {base.id}; if both are the same model, say so (same_base)"]


def _is_folder(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or "\\" in name or name.count("/") > 1


def _plain_name(name: str) -> str:
    """`unsloth/llama-2-7b-bnb-4bit` and `meta-llama/Llama-2-7b-hf` are one model in two wrappings."""
    plain = name.rsplit("/", 1)[-1].lower()
    return re.sub(r"(-(unsloth|bnb|4bit|8bit|nf4|hf|fp16|bf16))+$", "", plain)


def digest(path: Path) -> str:
    """The content's name: sha256 over the sha256 of the weights and of the config. Reads the whole file."""
    return content_digest(file_sha256(path / WEIGHTS), file_sha256(path / CONFIG))


def content_digest(weights_sha256: str, config_sha256: str) -> str:
    """`digest` from the two parts' own sha256."""
    return hashlib.sha256(f"{weights_sha256}\n{config_sha256}\n".encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
