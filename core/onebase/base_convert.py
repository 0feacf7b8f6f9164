"""Turns what a base is published as into what onebase reads: safetensors, config.json, tokenizer.json.

Two sources: a GGUF file, pickled shards (`pytorch_model*.bin`); sentencepiece_convert.py has the third. Each function
writes into a folder that its caller will rename into place; nothing here knows about the home folder or the network.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from onebase.errors import BaseModelError


def convert_gguf(gguf_file: Path, into: Path) -> None:
    """Dequantise a GGUF file into `into`: bf16 safetensors, config, tokenizer with its chat template.

    bf16, because the published weights are bf16, compute is bf16, and rounding Q4_1's values to it (2^-9 relative)
    is small beside Q4_1's own step (1/15 of a block's range); it halves the file that fp32 would make.
    """
    import torch
    import transformers
    from safetensors.torch import save_file

    # Before GgufConfig existed, gguf_file= alone always meant dense weights.
    dense = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32, local_files_only=True, **dense
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, local_files_only=True
        )
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        raise BaseModelError(f"{gguf_file} dequantises to values that are not finite: {', '.join(bad[:5])}")
    # Not model.save_pretrained: it refuses a model that remembers having come from GGUF.
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(into)
    model.generation_config.save_pretrained(into)
    tokenizer.save_pretrained(into)
    _tidy_configs(into)
    _restore_digit_splitting(gguf_file, into / "tokenizer.json")


def convert_pickled_shards(folder: Path) -> None:
    """`pytorch_model*.bin` -> safetensors, shard by shard, with `weights_only` so that no pickle runs code.

    Does nothing where safetensors are already there. OpenLLaMA's repositories hold only pickles.
    """
    import torch
    from safetensors.torch import save_file

    shards = sorted(folder.glob("pytorch_model*.bin"))
    if not shards or any(folder.glob("*.safetensors")):
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors: dict[str, Any] = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        # Old Llama files carry the rotary frequencies, which transformers computes itself.
        kept = {k: v.contiguous() for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
        save_file(kept, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(kept, name)
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    for shard in shards:
        shard.unlink()
    (folder / "pytorch_model.bin.index.json").unlink(missing_ok=True)


def _tidy_configs(folder: Path) -> None:
    """GGUF keeps fp32 numbers, conversion leaves its traces, and the pad token is eos: write what serves a base.

    A pad token that is not eos matters to other tools that read this folder; onebase itself masks by position.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    for trace in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(trace, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")

    file = folder / "tokenizer_config.json"
    tokenizer = json.loads(file.read_text("utf-8"))
    for trace in ("is_local", "local_files_only"):
        tokenizer.pop(trace, None)
    tokenizer |= {"add_bos_token": False, "model_max_length": config["max_position_embeddings"]}
    if tokenizer.get("pad_token") == tokenizer["eos_token"] and tokenizer.get("unk_token"):
        tokenizer["pad_token"] = tokenizer["unk_token"]
    file.write_text(json.dumps(tokenizer, indent=2, sort_keys=True) + "\n", "utf-8")


def _restore_digit_splitting(gguf_file: Path, tokenizer_json: Path) -> None:
    """SmolLM2 splits numbers into digits before merging (`tokenizer.ggml.pre` = smollm); the converter drops that."""
    import gguf

    field = gguf.GGUFReader(gguf_file).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm":
        return
    content = json.loads(tokenizer_json.read_text("utf-8"))
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    tokenizer_json.write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers draws bars of its own (one of them past its own switch), which would fight with ours."""
    from transformers.utils import logging as transformers_logging

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of an optional package at import
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
