"""A whole base in a home folder, tiny and random: everything of a run but its size. Real libraries, seconds a run."""

import json
from pathlib import Path
from typing import Any

import yaml

from onebase.base_fetch import fetch_folder
from onebase.bases import BaseSpec
from onebase.home import Home
from sample_tokenizers import sentencepiece_folder

NAME = "tiny-llama"


def tiny_base(root: Path, *, hidden: int = 64, layers: int = 2, context: int = 256) -> tuple[Home, BaseSpec]:
    """A random Llama with OpenLLaMA's kind of tokenizer (bos, byte fallback, legacy space), in `root/home`."""
    import torch
    import transformers

    source = sentencepiece_folder(root / NAME)
    rows = json.loads((source / "config.json").read_text())["vocab_size"]
    config = transformers.LlamaConfig(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.lm_head.weight.data *= 10  # or no adapter could make it sure of a token
    model.save_pretrained(source)
    home = Home(root / "home").create()
    return home, fetch_folder(home, source)


CONVERSATIONS: list[list[tuple[str, str]]] = [
    [
        ("human", f"Hello {n}"),
        ("gpt", f"The quick brown fox {n}."),
        ("human", "Bye"),
        ("gpt", "I am fine." * (1 + n % 3)),
    ]
    for n in range(24)
]


def sharegpt_file(path: Path, conversations: list[list[tuple[str, str]]] | None = None) -> Path:
    lines = [
        json.dumps({"conversations": [{"from": who, "value": text} for who, text in turns]})
        for turns in conversations or CONVERSATIONS
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(data: Path, /, **sections: Any) -> dict[str, Any]:
    """A recipe's plain values on the tiny base: fp32, so that equal means equal. Of CONVERSATIONS 4 are held out."""
    content: dict[str, Any] = {
        "name": "tiny",
        "base": NAME,
        "data": {"train": str(data), "eval_fraction": 0.2},
        "lora": {"r": 4, "alpha": 8},
        "train": {"epochs": 2, "batch_size": 4, "learning_rate": 5e-3},
        "compute": {"dtype": "float32", "threads": 1, "device": "cpu"},
    }
    for name, values in sections.items():
        content[name] = {**content.get(name, {}), **values} if isinstance(values, dict) else values
    return content


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path
