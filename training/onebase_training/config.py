"""One YAML file -> one frozen `Recipe`: every knob of a run, its default and what it costs. No torch.

The field defaults are the `default` preset; `presets.py` holds what `seed` changes. The seed's own YAML files are
recognised and translated by `seed_config.py`. Nothing below this module reads YAML, the environment or presets.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from onebase.errors import RecipeError
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training.presets import PRESETS, merged
from onebase_training.recipe_file import read_yaml
from onebase_training.recipe_problems import Pattern, Section, key_of, told
from onebase_training.seed_config import is_seed_config, translate_seed_config

ADAPTER_NAME: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"


class Source(Section):
    """One training file. A bare path in YAML is a source with these defaults."""

    path: str
    """A local file (relative to the recipe, then to the working directory), or a hub dataset `owner/name`."""
    format: Literal["auto", "sharegpt", "openai", "alpaca", "orca", "completion", "text"] = "auto"
    weight: float = Field(default=1.0, ge=0.001, le=100)
    """How often an epoch shows each row of this file: 2 is twice, 0.5 every other time (half of the rows in the
    first epoch, the other half in the second)."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our key -> the data's column: `{prompt: question, completion: answer}`."""
    split: str = "train"
    """Of a hub dataset, or of a folder that `datasets` saved, as are the following."""
    subset: str | None = None
    revision: str | None = None


def _as_sources(value: Any) -> Any:
    """`train: a.jsonl` and `train: [a.jsonl, {path: b.json, weight: 2}]` both work."""
    if isinstance(value, str | dict):
        value = [value]
    return [{"path": v} if isinstance(v, str) else v for v in value] if isinstance(value, list | tuple) else value


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources)]


class Headers(Section):
    """The seed's header keys, for its formats with other headers than onebase serves."""

    system: str | None = None
    user: str
    response: str
    after_eos: str = "\n\n"


class DataConfig(Section):
    train: Sources = Field(min_length=1)
    eval: Sources = ()
    """Held-out files. Empty: about `eval_fraction` of the training rows are held out."""
    eval_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Held out are the rows whose hash, as a number from 0 to 1, is below it: the same ones in any order of files,
    and still so when rows are added."""
    max_eval_rows: int | None = Field(default=None, ge=1)
    """Most rows to evaluate. Of split-off rows the rest is trained on; of held-out files it is left out, and told.
    None: 1,000 split-off rows, and all of held-out files."""
    max_tokens: int | None = Field(default=None, ge=8, le=2**24)
    """Longest row in tokens. None: the base's context, but 2,048 at most."""
    too_long: Literal["drop", "truncate", "cut", "error"] = "truncate"
    """truncate: leave out whole turns from the end, so that no answer loses its eos; drop: leave out the row;
    cut: at the limit, eos or not (the seed's way); error: stop before training."""
    deduplicate: bool = True
    unknown_role: Literal["error", "keep"] = "error"
    """keep: the seed's way, an upper-cased `### NAME:` header."""
    prompt_format: Literal["human_response", "chat_template"] = "human_response"
    headers: Headers | None = None
    """Other headers than the format's: the server can't render such prompts, only /v1/completions can use them."""
    chunk_chars: int = Field(default=4000, ge=1, le=2**28)
    chunk_overlap: int = Field(default=0, ge=0)
    chunk_prefix: str = ""
    """Plain text files are cut in chunks of so many characters."""

    @model_validator(mode="after")
    def _chunks_advance(self) -> "DataConfig":
        if self.chunk_overlap >= self.chunk_chars:
            raise ValueError("chunk_overlap must be smaller than chunk_chars, or the chunks never advance")
        return self


class LoraConfig(Section):
    """PEFT's LoraConfig, by its own words."""

    r: int = Field(default=16, ge=1, le=512)
    """Rank. QLoRA's paper saw no visible effect of it once all linear layers are targeted."""
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Above 0 it costs a little time."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    layers: tuple[int, ...] | None = None
    """Only these layers (`layers_to_transform`). Fewer and later layers are faster: nothing flows below them."""
    rank_pattern: dict[Pattern, Annotated[int, Field(ge=1, le=512)]] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    """Slower, and served only where the server can do it exactly."""
    init: Literal["default", "gaussian", "orthogonal", "loftq"] = "default"
    """loftq: starts from the NF4 rounding error (the form that leaves the base as it is)."""


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0, le=10_000)] | Literal["auto"] = "auto"
    """auto: 3, more for small files and fewer for large ones (OpenAI's rule)."""
    max_steps: int | None = Field(default=None, ge=1, le=10_000_000)
    batch_size: int = Field(default=8, ge=1, le=4096)
    """Conversations to an optimiser step, over all devices. How many tokens go through at once is another knob."""
    tokens_at_once: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """A micro-batch holds at most so many tokens (or one row). Memory grows with it; the result does not change."""
    packing: bool = True
    """Rows of a micro-batch lie end to end without padding. False: padded side by side (slower, equal results)."""
    learning_rate: float = Field(default=2e-4, gt=0, lt=1)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(default=0.03, ge=0)
    """Below 1 a share of all steps; from 1 on a number of steps."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0)
    optimizer: str = "adamw_torch"
    """Any of transformers' names: adamw_torch, adamw_8bit, paged_adamw_8bit, paged_adamw_32bit, ..."""
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    loss: Literal["response", "all"] = "response"
    """response: the assistant's answers and their eos. all: every token (the seed's way)."""
    normalize: Literal["tokens", "rows"] = "tokens"
    """tokens: each supervised token of a step counts the same. rows: each row does (as the seed's Trainer did)."""
    seed: int = Field(default=42, ge=0, le=2**31 - 1)
    log_every: int = Field(default=1, ge=1)
    eval_every: Annotated[int, Field(ge=1)] | Literal["epoch", "never"] = "epoch"
    early_stopping: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a lower response loss. The best version is published, not the last."""
    save_every: Annotated[int, Field(ge=1)] | Literal["epoch", "never"] = "epoch"
    keep_checkpoints: int = Field(default=2, ge=1)
    tensorboard: bool = False


class ComputeConfig(Section):
    device: str = "auto"
    """auto: CUDA if there is one, else CPU."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of activations and unpacked weights. auto: bfloat16, but float32 on a CPU without bf16 instructions."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations again in the backward pass: saves most of their memory, costs a third of a step. auto: on
    CUDA for as many layers as it takes to stay below `memory_gb`; never on CPU."""
    memory_gb: float | None = Field(default=None, gt=0)
    """With auto: GPU memory, in GB (10^9 bytes), that a step may take. None: most of what is free at the start."""
    keep_dequantized: bool | Literal["auto"] = "auto"
    """Hold each NF4 weight's 16-bit values too, instead of unpacking them at every use: the same numbers, faster,
    4 times the base's memory. auto: on CPU when they fit in a third of the free memory."""
    preflight: bool | Literal["auto"] = "auto"
    """Run the longest micro-batch first, to fail before hours are spent. auto: on CUDA, and for long rows."""
    threads: int | None = Field(default=None, ge=1, le=4096)


class EvalConfig(Section):
    """What the form of an answer can be read from."""

    checks: dict[str, Pattern] = Field(default_factory=dict)
    """Name -> regular expression that must be found (`re.search`) in every answer to a held-out prompt."""


class Recipe(Section):
    """A whole run. `folder` is where relative paths start; it is no YAML key."""

    name: Annotated[str, Field(pattern=ADAPTER_NAME)]
    """The adapter's name; a good end publishes its next version."""
    base: str = "SmolLM2-135M-Instruct"
    preset: Literal["default", "seed"] = "default"
    description: str = ""
    resume_from: str | None = None
    """Go on from a published version (`name` or `name@3`) instead of a fresh adapter."""
    data: DataConfig
    lora: LoraConfig = Field(default_factory=LoraConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    compute: ComputeConfig = Field(default_factory=ComputeConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    notices: tuple[str, ...] = ()
    """What the translation of a seed file changed; shown at the start."""
    folder: Path = Path()

    def settings(self) -> dict[str, Any]:
        """The resolved settings as plain values, for the manifest."""
        return self.model_dump(mode="json", exclude={"folder", "notices"})


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe. Raises RecipeError naming each wrong key, with near names for unknown ones."""
    return make_recipe(read_yaml(path), folder=path.resolve().parent)


def make_recipe(content: Mapping[str, Any], folder: Path = Path()) -> Recipe:
    """The same from plain values. `folder` is where relative paths start."""
    raw = dict(content)
    is_seed = is_seed_config(raw)
    if is_seed:
        raw = translate_seed_config(raw)
    preset = raw.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise RecipeError(f"preset: unknown preset {preset!r}; there are {', '.join(PRESETS)}", param="preset")
    try:
        return Recipe.model_validate({**merged(PRESETS[preset], raw), "folder": folder})
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)
        problems = dict.fromkeys(told(detail, Recipe, Source, is_seed=is_seed) for detail in details)
        raise RecipeError("; ".join(problems), param=key_of(details[0], is_seed=is_seed) or "recipe") from error


def recipe_for_file(path: Path, home: Home, adapters: Sequence[str], split: str = "train") -> Recipe:
    """A recipe that holds out a whole file, on the base of the first adapter: for measuring on a file.

    `path` may be what a source's may: also a folder that `datasets` saved, or a hub dataset `owner/name`. `split`: of
    those two.
    """
    store = AdapterStore(home.adapters)
    first = store.resolve(adapters[0]).manifest if adapters else None
    source = {"path": str(path.resolve() if os.path.exists(path) else path), "split": split}
    content: dict[str, Any] = {
        "name": "measured",
        "data": {"train": [source], "eval": [source], "deduplicate": False},
    }
    if first is not None:
        content["base"] = first.base.id
        content["data"]["prompt_format"] = first.prompt_format
    return make_recipe(content)
