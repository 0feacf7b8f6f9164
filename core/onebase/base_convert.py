"""Turns pickled shards into safetensors; and keeps transformers quiet. Torch is imported where it is needed.

GGUF files and SentencePiece tokenizers have modules of their own (gguf_convert.py, sentencepiece_convert.py).
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any


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
