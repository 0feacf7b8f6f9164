"""A base of OpenLLaMA-7B's shape with random weights and a small tokenizer, for benchmarks without a download.

    python bench/random_base.py FOLDER [--no-weights] [--tokenizer FOLDER]

`gpu_http.py` wants the two JSON files only (--no-weights); `train_while_serving.py` the weights too, 13.5 GB in bf16,
one file a layer. `--tokenizer`: a folder whose tokenizer.json of at most 32,000 tokens is taken instead of one that is
trained here on a few lines. PYTHONPATH=core:server:tests.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from sample_tokenizers import sentencepiece_folder

VOCAB = 32000
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json")


def write_base(folder: Path, options: argparse.Namespace) -> None:
    sentencepiece_folder(folder)
    if options.tokenizer is not None:
        for name in TOKENIZER:
            (folder / name).unlink(missing_ok=True)
            if (options.tokenizer / name).exists():
                shutil.copy(options.tokenizer / name, folder / name)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "intermediate_size": options.inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if options.weights:
        write_weights(folder, options)


def write_weights(folder: Path, options: argparse.Namespace) -> None:
    hidden, inner, count = options.hidden, options.inner, options.layers + 1
    places: dict[str, str] = {}

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number + 1:05}-of-{count:05}.safetensors"
        tensors = {
            name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.02 for name, shape in shapes.items()
        }
        save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(shapes, file))

    square, up, down = (hidden, hidden), (inner, hidden), (hidden, inner)
    for layer in range(options.layers):
        modules = {f"self_attn.{name}_proj": square for name in "qkvo"}
        modules |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
        norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        write(layer, {f"model.layers.{layer}.{name}.weight": shape for name, shape in (modules | norms).items()})
    rows = (VOCAB, hidden)
    write(options.layers, {"model.embed_tokens.weight": rows, "lm_head.weight": rows, "model.norm.weight": (hidden,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-weights", dest="weights", action="store_false")
    parser.add_argument("--tokenizer", type=Path)
    for name, size in {"layers": 32, "hidden": 4096, "inner": 11008, "heads": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    chosen = parser.parse_args()
    write_base(chosen.folder, chosen)
    print(f"written: {chosen.folder}")
