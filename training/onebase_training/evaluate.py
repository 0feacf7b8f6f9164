"""How good a version is on held-out conversations, beside the base: response loss, token accuracy, stop rate, checks.

Used by hand (`onebase eval`) and as the gate of retraining. It measures with the trainer's own model and the
renderer that serves; it publishes nothing.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onebase.base_fetch import find_base
from onebase.base_model import LoadedBase
from onebase.durable import replace_file
from onebase.errors import InvalidInput
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase.tokenizer import TextTokenizer
from onebase_training import attention, lora
from onebase_training.assemble import make_renderer, read_data
from onebase_training.beside import Beside
from onebase_training.config import Recipe
from onebase_training.generate import greedy_answers
from onebase_training.objective import Objective
from onebase_training.rows import Row
from onebase_training.status import StatusWriter
from onebase_training.trainer import eval_batches, held_out_metrics


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model on one set of held-out conversations. Rates are 0..1; None where nothing could be generated."""

    model: str
    response_loss: float
    """Nats a learnt token."""
    token_accuracy: float
    stop_rate: float | None
    """Greedy answers that end by an end token within the limit."""
    exact_match: float | None
    checks: Mapping[str, float]
    examples: int
    tokens: int


def evaluate(
    recipe: Recipe,
    home: Home,
    adapters: Sequence[str],
    *,
    with_base: bool = True,
    max_examples: int | None = None,
    max_new_tokens: int = 200,
    console: Console | None = None,
    status: StatusWriter | None = None,
    policy: str = "serve-first",
) -> list[Measurement]:
    """Measure the base (first) and each adapter on the recipe's held-out rows. Raises OnebaseError."""
    console, status = console or Console(), status or StatusWriter(None)
    store = AdapterStore(home.adapters)
    versions = [store.resolve(name) for name in adapters]
    spec = find_base(home, recipe.base)
    _require_base(versions, spec.identity)
    tokenizer = TextTokenizer.load(spec.path)
    rows = read_data(recipe, spec, tokenizer, lambda text: status.progress(message=text)).eval[:max_examples]
    if not rows:
        raise InvalidInput("nothing is held out: give data.eval, or data.eval_fraction above 0", param="data.eval")
    device = lora.compute_settings(recipe.compute)
    dtype = lora.compute_dtype(recipe.compute.dtype, device)
    beside = Beside(home.serving, policy, device, sign_of_life=lambda _: status.progress())
    base = beside.load_base(spec, tokenizer, dtype)
    beside.watch(base.model)
    base.model.config._attn_implementation = attention.register()
    lora.keep_dequantized(base, recipe.compute.keep_dequantized)
    results = []
    for version in [*([None] if with_base else []), *versions]:
        name = version.id if version else spec.id
        status.progress(message=f"evaluating {name}")
        results.append(_measure(name, base, version, recipe, rows, max_new_tokens))
        beside.guard()
        console.print(f"{name}: response loss {results[-1].response_loss:.4f}")
    return results


def _measure(
    name: str, base: LoadedBase, version: Version | None, recipe: Recipe, rows: Sequence[Row], max_new_tokens: int
) -> Measurement:
    with lora.published_adapter(base, version.path if version else None) as model:
        model.eval()
        batches = eval_batches(rows, tokens_at_once=2048, pad_id=base.tokenizer.pad_id)
        metrics = held_out_metrics(Objective(model), batches, base.device, "")
        prompts, references = _questions(rows)
        renderer = make_renderer(recipe, base.spec, base.tokenizer)
        answers = greedy_answers(
            model,
            prompts,
            end_ids=renderer.stop_token_ids(),
            pad_id=base.tokenizer.pad_id,
            max_new_tokens=max_new_tokens,
        )
    texts = [renderer.parse(ids).content for ids in answers]
    wanted = [renderer.parse(ids).content for ids in references]
    stopped = [bool(ids) and ids[-1] in renderer.stop_token_ids() for ids in answers]
    return Measurement(
        model=name,
        response_loss=metrics["loss"],
        token_accuracy=metrics["accuracy"],
        stop_rate=_share(stopped),
        exact_match=_share([text.strip() == want.strip() for text, want in zip(texts, wanted, strict=True)]),
        checks={
            check: _share([re.search(pattern, text) is not None for text in texts]) or 0.0
            for check, pattern in recipe.eval.checks.items()
        },
        examples=len(rows),
        tokens=int(metrics["tokens"]),
    )


def _questions(rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]]]:
    """Every prompt of the rows with the answer that stands there. Plain texts have no prompt."""
    prompts, references = [], []
    for row in rows:
        for start, end in row.answers():
            if start > 1:
                prompts.append([int(i) for i in row.ids[:start]])
                references.append([int(i) for i in row.ids[start:end]])
    return prompts, references


def _share(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _require_base(versions: Sequence[Version], identity: Any) -> None:
    for version in versions:
        if version.manifest.base.id != identity.id:
            raise InvalidInput(
                f"{version.id} was trained on {version.manifest.base.id}, the recipe's base is {identity.id}",
                param="adapter",
            )


def as_table(results: Sequence[Measurement]) -> Table:
    checks = [name for name in results[0].checks] if results else []
    table = Table(title=f"{results[0].examples} held-out conversations, {results[0].tokens} response tokens")
    for column in ("model", "response loss", "token accuracy", "stops by eos", "exact match", *checks):
        table.add_column(column, justify="left" if column == "model" else "right")
    for r in results:
        rates = [r.token_accuracy, r.stop_rate, r.exact_match, *(r.checks[name] for name in checks)]
        table.add_row(r.model, f"{r.response_loss:.4f}", *("-" if v is None else f"{v:.0%}" for v in rates))
    return table


def write_json(results: Sequence[Measurement], path: Path) -> None:
    """All models under `models`, and the last one's values at the top, which is what a gate reads."""
    content = {**asdict(results[-1]), "models": [asdict(result) for result in results]}
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
