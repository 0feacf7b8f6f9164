"""How good a version is on held-out conversations, beside the base: response loss, token accuracy, stop rate, checks.

Used by hand (`onebase eval`) and as the gate of retraining. It measures with the trainer's own model and the
renderer that serves; it publishes nothing.
"""

import re
from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console

from onebase.base_fetch import find_base
from onebase.base_model import LoadedBase
from onebase.errors import InvalidInput
from onebase.home import Home
from onebase.store import AdapterStore, Version
from onebase.tokenizer import TextTokenizer
from onebase_training import attention, eval_reports, lora
from onebase_training.alive import while_working
from onebase_training.assemble import read_data
from onebase_training.beside import Beside
from onebase_training.config import Recipe
from onebase_training.eval_checks import EXACT
from onebase_training.eval_reports import Measurement
from onebase_training.generate import greedy_answers
from onebase_training.held_out import eval_batches, held_out_metrics
from onebase_training.objective import Objective
from onebase_training.rows import Row, make_renderer
from onebase_training.status import StatusWriter

_MISSES: Final = 3
_MISS_CHARS: Final = 200


def evaluate(
    recipe: Recipe,
    home: Home,
    adapters: Sequence[str],
    *,
    with_base: bool = True,
    deciding: Sequence[str] = (),
    max_examples: int | None = None,
    max_new_tokens: int = 200,
    console: Console | None = None,
    status: StatusWriter | None = None,
    policy: str = "serve-first",
) -> list[Measurement]:
    """Measure the base (first) and each adapter on the recipe's held-out rows. Raises OnebaseError.

    `deciding`: the checks of which a few missing answers are to be shown.
    """
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
    with while_working(status.alive):
        base = beside.load_base(spec, tokenizer, dtype)
        base.model.config._attn_implementation = attention.register()
        lora.keep_dequantized(base, recipe.compute.keep_dequantized)
    beside.watch(base.model)
    results = []
    for version in [*([None] if with_base else []), *versions]:
        name = version.id if version else spec.id
        status.progress(message=f"evaluating {name}")
        results.append(_measure(name, base, version, recipe, rows, max_new_tokens, deciding))
        beside.guard()
        if version is not None:
            eval_reports.keep(home.evaluations, results[-1:], _data_name(recipe), rows)
        console.print(f"{name}: response loss {results[-1].response_loss:.4f}")
    return results


def _measure(
    name: str,
    base: LoadedBase,
    version: Version | None,
    recipe: Recipe,
    rows: Sequence[Row],
    max_new_tokens: int,
    deciding: Sequence[str],
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
    passed = {EXACT: [text.strip() == want.strip() for text, want in zip(texts, wanted, strict=True)]}
    for check, pattern in recipe.eval.checks.items():
        passed[check] = [re.search(pattern, text) is not None for text in texts]
    return Measurement(
        model=name,
        response_loss=metrics["loss"],
        token_accuracy=metrics["accuracy"],
        stop_rate=_share(stopped),
        exact_match=_share(passed[EXACT]),
        checks={check: _share(passed[check]) or 0.0 for check in recipe.eval.checks},
        examples=len(rows),
        tokens=int(metrics["tokens"]),
        misses={check: _first_misses(texts, passed[check]) for check in deciding},
    )


def _first_misses(texts: Sequence[str], passed: Sequence[bool]) -> list[str]:
    """What somebody has to see to know what is wrong: a few, not all."""
    return [text[:_MISS_CHARS] for text, good in zip(texts, passed, strict=True) if not good][:_MISSES]


def _data_name(recipe: Recipe) -> str:
    """What the held-out rows are, to a reader."""
    if recipe.data.eval:
        return ", ".join(source.path for source in recipe.data.eval)
    return f"{recipe.data.eval_fraction:.0%} of {', '.join(source.path for source in recipe.data.train)}"


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
