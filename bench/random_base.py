"""A base folder at OpenLLaMA-7B's shape with random weights (13.5 GB), for what is timed through a whole server, whose
speed does not depend on the values. The tokenizer is the first 32,000 tokens of another base's.

    PYTHONPATH=core python bench/random_base.py OUT --tokenizer FOLDER [--device cuda] [--no-weights]

`gpu_http.py` needs no weights, `train_while_serving.py` does.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, HEADS, VOCAB = 4096, 11008, 32, 32, 32_000
SCALE = 0.02
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
}


def shards() -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes, a file at a time."""
    yield {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        yield {
            **{f"{layer}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
            **{f"{layer}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")},
            f"{layer}.mlp.down_proj.weight": (HIDDEN, INNER),
            f"{layer}.input_layernorm.weight": (HIDDEN,),
            f"{layer}.post_attention_layernorm.weight": (HIDDEN,),
        }


def write_weights(out: Path, device: str) -> None:
    torch.manual_seed(0)
    where: dict[str, str] = {}
    for number, shapes in enumerate(shards()):
        file = f"model-{number + 1:05}-of-{LAYERS + 1:05}.safetensors"
        tensors = {
            name: (torch.ones if len(shape) == 1 else torch.randn)(shape, device=device, dtype=torch.bfloat16)
            .mul_(1.0 if len(shape) == 1 else SCALE)
            .cpu()
            for name, shape in shapes.items()
        }
        save_file(tensors, out / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shapes, file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}), "utf-8")


def cut_tokenizer(source: Path, out: Path) -> None:
    """BPE's ids are in the order in which it merges, so its first ones are a tokenizer of their own."""
    tokenizer: dict[str, Any] = json.loads((source / "tokenizer.json").read_text("utf-8"))
    model = tokenizer["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < VOCAB}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= model["vocab"].keys()]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["id"] < VOCAB]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a base folder with a BPE tokenizer.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="draws the values")
    parser.add_argument("--no-weights", dest="weights", action="store_false", help="config and tokenizer only")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    (options.out / "config.json").write_text(json.dumps(CONFIG, indent=1), "utf-8")
    cut_tokenizer(options.tokenizer, options.out)
    if options.weights:
        write_weights(options.out, options.device)


if __name__ == "__main__":
    main()
