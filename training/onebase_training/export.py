"""A version in a form that other tools read: PEFT's folder, a merged model, a GGUF LoRA; and to the hub."""

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from onebase.base_fetch import find_base
from onebase.bases import BaseSpec
from onebase.errors import OnebaseError
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase.tokenizer import TextTokenizer
from onebase_training.merge import Onto, Parity, merge, parity

Form = Literal["peft", "merged", "gguf-lora"]

PROBE = (
    "A base model is frozen. An adapter adds a small change of low rank to each of its layers, "
    "and many adapters share one base: 1, 2, 3, and so on.\nWhich one answers, the request says."
)


def export(
    model: str,
    dest: Path,
    home: Home,
    *,
    form: Form = "peft",
    onto: Onto = "base",
    dtype: torch.dtype = torch.bfloat16,
    check: bool = True,
    console: Console | None = None,
) -> Path:
    """Write the version to `dest`, which must not exist. Raises OnebaseError."""
    console = console or Console()
    store = AdapterStore(home.adapters)
    version = store.resolve(model)
    if form == "peft":
        return store.export(model, dest)
    spec = find_base(home, version.manifest.base.id)
    if form == "gguf-lora":
        from onebase_training.gguf_lora import write_gguf_lora

        return write_gguf_lora(version.path, spec, dest)
    merged = merge(version.path, spec, dest, onto=onto, dtype=dtype)
    (merged / "README.md").write_text(_card(version, onto), "utf-8")
    if check:
        _tell(console, parity(version.path, spec, merged, _probe(spec), onto=onto))
    return merged


def push(folder: Path, repository: str, *, private: bool = True) -> str:
    """Upload a folder to the hub under `owner/name`; the address. Raises OnebaseError when the hub refuses."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise OnebaseError(f"{folder} could not be pushed to {repository}: {error}. `hf auth login` first?") from error


def _probe(spec: BaseSpec) -> list[int]:
    tokenizer = TextTokenizer.load(spec.path)
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return start + tokenizer.encode(PROBE, True)


def _tell(console: Console, found: Parity) -> None:
    console.print(
        f"largest logit difference from the unmerged adapter {found.max_logit_difference:.4f}, "
        f"KL {found.kl_same_base:.2e} nats a token; KL from what is served (NF4) {found.kl_served:.2e}"
    )


def _card(version: Version, onto: Onto) -> str:
    base = version.manifest.base
    under = "its published weights" if onto == "base" else "its NF4 values, as served"
    return (
        f"---\nbase_model: {base.id}\ntags: [onebase, merged]\n---\n\n# {version.id}, merged\n\n"
        f"The adapter `{version.id}` added into `{base.id}` at revision `{base.revision}`, onto {under}.\n"
        f"Prompt format: `{version.manifest.prompt_format}`.\n"
    )
