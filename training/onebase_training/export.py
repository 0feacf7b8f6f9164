"""A version in a form that other tools read: PEFT's folder, a merged model, GGUF.

A folder of PEFT's files goes too: what was trained but can't be served (DoRA) is merged from its run's folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from onebase.adapter import AdapterFiles
from onebase.base_fetch import find_base
from onebase.bases import BaseSpec
from onebase.errors import Conflict
from onebase.home import Home
from onebase.store import AdapterStore
from onebase.tokenizer import TextTokenizer
from onebase_training.merge import Onto, Parity, merge, parity

Form = Literal["peft", "merged", "gguf-lora", "gguf-merged"]
GgufType = Literal["f16", "bf16", "q8_0"]

PROBE = (
    "A base model is frozen. An adapter adds a small change of low rank to each of its layers, "
    "and many adapters share one base: 1, 2, 3, and so on.\nWhich one answers, the request says."
)


@dataclass(frozen=True, slots=True)
class Source:
    """What is exported: a version of the store, or a folder of PEFT's two files."""

    path: Path
    id: str
    base_id: str
    prompt_format: str | None
    """None: nobody has written down which one it was trained with."""

    @classmethod
    def find(cls, model: str, store: AdapterStore) -> "Source":
        folder = Path(model)
        if (folder / "adapter_config.json").is_file():
            files = AdapterFiles.read(folder)
            base_id = str(files.config.raw.get("base_model_name_or_path") or "")
            prompt_format = files.manifest.prompt_format if files.manifest else None
            return cls(folder, folder.resolve().parent.name, base_id, prompt_format)
        version = store.resolve(model)
        return cls(version.path, version.id, version.manifest.base.id, version.manifest.prompt_format)


def export(
    model: str,
    dest: Path,
    home: Home,
    *,
    form: Form = "peft",
    onto: Onto = "base",
    dtype: torch.dtype = torch.bfloat16,
    gguf_type: GgufType = "f16",
    check: bool = True,
    console: Console | None = None,
) -> Path:
    """Write the version (or folder) to `dest`, which must not exist. Raises OnebaseError."""
    console = console or Console()
    store = AdapterStore(home.adapters)
    if form == "peft":
        return store.export(model, dest)
    source = Source.find(model, store)
    if dest.exists():
        raise Conflict(f"{dest} already exists", param="dest")
    dest.parent.mkdir(parents=True, exist_ok=True)
    spec = find_base(home, source.base_id)
    if form == "gguf-lora":
        from onebase_training.gguf_lora import write_gguf_lora

        return write_gguf_lora(source.path, spec, dest)
    if form == "gguf-merged":
        from onebase_training.gguf_merged import write_gguf_merged

        return write_gguf_merged(source.path, spec, dest, onto=onto, kind=gguf_type, name=source.id)
    merged = merge(source.path, spec, dest, onto=onto, dtype=dtype)
    found = _told(parity(source.path, spec, merged, _probe(spec), onto=onto)) if check else ""
    (merged / "README.md").write_text(_card(source, spec, onto, found), "utf-8")
    if found:
        console.print(found)
    return merged


def _probe(spec: BaseSpec) -> list[int]:
    tokenizer = TextTokenizer.load(spec.path)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(PROBE, True)


def _told(found: Parity) -> str:
    return (
        f"largest logit difference from the unmerged adapter {found.max_logit_difference:.4f}, "
        f"KL {found.kl_same_base:.2e} nats a token; KL from what is served (NF4) {found.kl_served:.2e}"
    )


def _card(source: Source, base: BaseSpec, onto: Onto, parity_told: str) -> str:
    under = "its published weights" if onto == "base" else "its NF4 values, as served"
    return (
        f"---\nbase_model: {base.id}\ntags: [onebase, merged]\n---\n\n# {source.id}, merged\n\n"
        f"The adapter `{source.id}` added into `{base.id}` at revision `{base.identity.revision}`, onto {under}.\n"
        + (f"Prompt format: `{source.prompt_format}`.\n" if source.prompt_format else "")
        + (f"\nMeasured after merging: {parity_told}.\n" if parity_told else "")
    )
