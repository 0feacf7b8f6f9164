"""What is done with a trained version: measured beside the base, merged, written for other tools. And data checks."""

import json
import re
import shutil
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from onebase.base_model import load_base
from onebase.bases import read_base, resolve_base
from onebase.errors import Conflict, InvalidInput
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training import lora
from onebase_training.__main__ import app
from onebase_training.config import Recipe, make_recipe
from onebase_training.eval_reports import Measurement, as_table, kept, write_json
from onebase_training.evaluate import evaluate
from onebase_training.export import export
from onebase_training.generate import greedy_answers
from onebase_training.merge import nf4_values
from onebase_training.train import Run, carry_out
from tiny_base import NAME, recipe, sharegpt_file, write_recipe

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
PROBE = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Recipe]:
    """A home with the tiny base and `tiny@1`, which learnt its few answers by heart."""
    from tiny_base import tiny_base

    root = tmp_path_factory.mktemp("trained")
    home, _ = tiny_base(root)
    content = recipe(
        sharegpt_file(root / "d.jsonl"),
        train={"epochs": 25, "learning_rate": 2e-2, "eval_every": "never", "save_every": "never"},
        lora={"r": 16, "alpha": 32},
        eval={"checks": {"ends_with_a_full_stop": r"\.\Z", "never": "xyzzy"}},
    )
    write_recipe(root / "recipe.yaml", content)
    loaded = make_recipe(content)
    carry_out(Run(loaded, home, root / "run", console=QUIET))
    return home, loaded


def test_a_version_is_measured_beside_the_base(trained: tuple[Home, Recipe], tmp_path: Path) -> None:
    base, adapter = evaluate(trained[1], trained[0], ["tiny"], max_new_tokens=40, console=QUIET)

    assert (base.model, adapter.model) == (NAME, "tiny@1")
    assert adapter.response_loss < base.response_loss / 2
    assert adapter.token_accuracy > base.token_accuracy
    assert base.stop_rate is not None
    assert adapter.stop_rate is not None
    assert base.stop_rate < adapter.stop_rate <= 1
    assert adapter.checks["ends_with_a_full_stop"] > adapter.checks["never"] == 0.0
    assert as_table([base, adapter]).row_count == 2
    write_json([base, adapter], tmp_path / "out.json")
    told = json.loads((tmp_path / "out.json").read_text())
    assert (told["response_loss"], told["stop_rate"]) == (adapter.response_loss, adapter.stop_rate)
    assert [each["model"] for each in told["models"]] == [NAME, "tiny@1"]
    [report] = kept(trained[0].evaluations, ["tiny"])
    assert (report["model"], report["response_loss"]) == ("tiny@1", adapter.response_loss)


def test_measuring_leaves_the_base_as_it_was(trained: tuple[Home, Recipe]) -> None:
    spec = resolve_base(trained[0], NAME)
    base = load_base(spec, compute_dtype="float32")
    with torch.no_grad():
        before = base.model(PROBE).logits
        with lora.published_adapter(base, AdapterStore(trained[0].adapters).resolve("tiny").path) as model:
            assert not torch.equal(model(PROBE).logits, before)
        assert torch.equal(base.model(PROBE).logits, before)


def test_nothing_held_out_is_told(trained: tuple[Home, Recipe]) -> None:
    nothing = trained[1].model_copy(update={"data": trained[1].data.model_copy(update={"eval_fraction": 0.0})})

    with pytest.raises(InvalidInput, match="nothing is held out"):
        evaluate(nothing, trained[0], ["tiny"], console=QUIET)


def test_answers_in_a_batch_are_the_answers_alone(trained: tuple[Home, Recipe]) -> None:
    base = load_base(resolve_base(trained[0], NAME), compute_dtype="float32")
    prompts = [list(range(5, 9)), list(range(20, 40)), list(range(7, 14))]
    settings: dict[str, Any] = {"end_ids": frozenset({2}), "pad_id": 0, "max_new_tokens": 6}
    with lora.published_adapter(base, AdapterStore(trained[0].adapters).resolve("tiny").path) as model:
        together = greedy_answers(model.eval(), prompts, **settings)
        alone = [greedy_answers(model.eval(), [prompt], **settings)[0] for prompt in prompts]

    assert together == alone


def merged_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load_base(read_base(folder), compute_dtype="float32", quantize=False).model(PROBE).logits
    return logits


def adapted_logits(home: Home, *, quantize: bool) -> torch.Tensor:
    base = load_base(resolve_base(home, NAME), compute_dtype="float32", quantize=quantize)
    path = AdapterStore(home.adapters).resolve("tiny").path
    with lora.published_adapter(base, path) as model, torch.no_grad():
        logits: torch.Tensor = model(PROBE).logits
    return logits


@pytest.mark.parametrize(("onto", "quantize"), [("base", False), ("nf4", True)])
def test_pitfall_16_a_merged_model_answers_as_the_adapter_on_the_same_weights(
    trained: tuple[Home, Recipe], tmp_path: Path, onto: Any, quantize: bool
) -> None:
    said = Console(record=True, width=200, quiet=False)

    folder = export(
        "tiny", tmp_path / "merged", trained[0], form="merged", onto=onto, dtype=torch.float32, console=said
    )

    torch.testing.assert_close(
        merged_logits(folder), adapted_logits(trained[0], quantize=quantize), rtol=1e-4, atol=1e-4
    )
    kl_same, kl_served = map(float, re.findall(r"(?:KL|\(NF4\)) ([\d.e+-]+)", said.export_text()))
    assert kl_same < 1e-6
    assert (kl_served < 1e-6) == (onto == "nf4")


def test_pitfall_4_a_merged_model_has_the_bases_vocabulary_and_tokenizer(
    trained: tuple[Home, Recipe], tmp_path: Path
) -> None:
    spec = resolve_base(trained[0], NAME)

    folder = export("tiny", tmp_path / "merged", trained[0], form="merged", check=False)

    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "whoever may read one file may read all"
    merged = read_base(folder)
    assert merged.vocab_size == spec.vocab_size
    assert merged.identity.config_hash == spec.identity.config_hash
    assert (folder / "tokenizer.json").read_bytes() == (spec.path / "tokenizer.json").read_bytes()


def test_nf4_values_are_those_that_the_loaded_base_holds(trained: tuple[Home, Recipe]) -> None:
    from safetensors.torch import load_file

    from onebase.base_model import dequantized, linear4bit_modules

    spec = resolve_base(trained[0], NAME)
    weights = load_file(spec.path / "model.safetensors")
    base = load_base(spec, compute_dtype="float32")

    for name, module in linear4bit_modules(base.model).items():
        assert torch.equal(nf4_values(weights[f"{name}.weight"]), dequantized(module, torch.float32))


def test_a_card_names_the_prompt_format_of_our_versions_and_none_of_a_folder_of_pefts(
    trained: tuple[Home, Recipe], tmp_path: Path
) -> None:
    ours, pefts = tmp_path / "ours", tmp_path / "pefts"
    export("tiny", ours, trained[0])
    shutil.copytree(ours, pefts, ignore=shutil.ignore_patterns("onebase.json"))

    cards = [
        (export(model, tmp_path / f"merged-{number}", trained[0], form="merged", check=False) / "README.md").read_text()
        for number, model in enumerate(("tiny", str(ours), str(pefts)))
    ]

    assert ["Prompt format: `human_response`." in card for card in cards] == [True, True, False]
    assert "rompt format" not in cards[2]


def test_export_never_writes_over_something(trained: tuple[Home, Recipe], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    for form in ("peft", "merged", "gguf-lora", "gguf-merged"):
        with pytest.raises(Conflict):
            export("tiny", tmp_path / "there", trained[0], form=form)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["merged", "gguf-lora", "gguf-merged"])
def test_an_export_that_fails_leaves_nothing_behind(
    trained: tuple[Home, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onebase_training.merge.save_file", full)
    monkeypatch.setattr("gguf.GGUFWriter.write_kv_data_to_file", full)

    with pytest.raises(OSError, match="No space left"):
        export("tiny", tmp_path / "new/out", trained[0], form=form)

    assert list((tmp_path / "new").iterdir()) == []


def test_dora_trains_and_is_merged_but_not_published(trained: tuple[Home, Recipe], tmp_path: Path) -> None:
    """One frozen base can't serve it; the run says what to do, and what is merged answers as PEFT's DoRA does."""
    home, loaded = trained
    content = recipe(Path(loaded.data.train[0].path), lora={"use_dora": True}, train={"max_steps": 3}, name="dora")
    said = Console(record=True, width=200, quiet=False, file=StringIO())

    result = carry_out(Run(make_recipe(content), home, tmp_path / "run", console=said))

    assert result.version is None
    assert AdapterStore(home.adapters).get("dora") is None
    text = " ".join(said.export_text().split())
    assert text.count("--form merged") == 2, "at the start, before hours are spent, and at the end"
    folder = export(str(tmp_path / "run/adapter"), tmp_path / "merged", home, form="merged", onto="nf4",
                    dtype=torch.float32, check=False)  # fmt: skip
    base = load_base(resolve_base(home, NAME), compute_dtype="float32")
    with torch.no_grad():
        untrained = base.model(PROBE).logits
        with lora.published_adapter(base, tmp_path / "run/adapter") as model:
            torch.testing.assert_close(merged_logits(folder), model(PROBE).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(merged_logits(folder), untrained, atol=1e-2)


def command(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments], env={"COLUMNS": "200"})


def test_the_command_line_measures_a_data_file_too(trained: tuple[Home, Recipe], tmp_path: Path) -> None:
    home, loaded = trained

    done = command(
        "evaluate", loaded.data.train[0].path, "--adapter", "tiny@1", "--no-base", "--max-examples", "3",
        "--home", str(home.root), "--out", str(tmp_path / "out.json"),
    )  # fmt: skip

    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text())["examples"] == 3


def test_a_check_that_fails_is_an_exit_code_of_its_own_and_shows_the_answers(
    trained: tuple[Home, Recipe], tmp_path: Path
) -> None:
    home, loaded = trained
    words = ["eval", loaded.data.train[0].path, "-a", "tiny", "--max-examples", "3", "--home", str(home.root)]

    passed = command(*words, "--check", r"words=\w", "--at-least", "0.5")
    failed = command(*words, "--check", "never=xyzzy", "--out", str(tmp_path / "out.json"))

    assert (passed.exit_code, failed.exit_code) == (0, 3), passed.output + failed.output
    assert "tiny@1 fails never: 0.0% of the answers, at least 100.0% must pass" in failed.output
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["failed"] == [{"model": "tiny@1", "check": "never", "share": 0.0, "at_least": 1.0}]
    assert repr(told["misses"]["never"][0]) in failed.output
    assert [each["model"] for each in told["models"]] == [NAME, "tiny@1"], "the base is shown, and not judged"

    shown = command("eval", "--reports", "-a", "tiny", "--home", str(home.root))

    assert shown.exit_code == 0
    assert "tiny@1" in shown.output
    assert "never" in shown.output


def test_a_table_in_a_narrow_terminal_keeps_the_models_names() -> None:
    name = "an-adapter-with-a-long-name@12"
    measured = Measurement(name, 1.0, 0.5, 0.5, 0.5, {"a_check_with_a_long_name": 1.0}, 1, 1, {})
    console = Console(width=80, file=StringIO())

    console.print(as_table([measured]))

    assert name in console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_data_check_tells_broken_lines_and_shows_what_is_learnt(trained: tuple[Home, Recipe], tmp_path: Path) -> None:
    good = Path(trained[1].data.train[0].path).read_text()
    (tmp_path / "d.jsonl").write_text(good + good.splitlines()[0] + "\nnot json\n")
    options = ("data", "check", str(tmp_path / "d.jsonl"), "--home", str(trained[0].root), "--base", NAME)

    shown, told = command(*options), command(*options, "--json")

    assert (shown.exit_code, told.exit_code) == (1, 1)
    assert "line 26: not JSON" in shown.output
    assert "The quick brown fox" in shown.output
    report = json.loads(told.stdout)
    assert (report["records"], report["usable"], report["duplicates"]) == (26, 25, 1)
    assert report["problems"] == [{"line": 26, "message": "not JSON: Expecting value (column 1)"}]


def test_data_check_renders_rows_as_a_recipe_with_the_same_keys_would(home: Home, tmp_path: Path) -> None:
    file = sharegpt_file(tmp_path / "d.jsonl", [[("human", "Hello"), ("Ghost", "Boo"), ("gpt", "Hi")]])
    options = ("data", "check", str(file), "--home", str(home.root), "--base", NAME)

    strict, kept = command(*options), command(*options, "--unknown-role", "keep")
    sharegpt_file(file, [[("human", "Hello"), ("gpt", "Hi")]])
    shown = command(*options, "--prompt-format", "chat_template")

    assert "unknown speaker 'Ghost'" in strict.output
    assert "### GHOST:" in kept.output
    assert "[INST] Hello [/INST]" in shown.output
    assert "###" not in shown.output
    assert [each.exit_code for each in (strict, kept, shown)] == [1, 0, 0]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("data", "check", "none.jsonl", "--base", NAME, "--prompt-format", "alpaca"), "data.prompt_format: "),
        (("train", "none.yaml"), "can't read the recipe"),
        (("none.yaml",), "can't read the recipe"),
        (("export", "nobody", "x"), "The model `nobody` does not exist"),
        (("export", "tiny", "x", "--form", "onnx"), "'onnx' is not one of peft, merged, gguf-lora"),
        (("eval", "none.jsonl", "-a", "tiny"), "no such file"),
        (("eval", "r.yaml", "--split", "test"), "a recipe names the split itself"),
        (("data", "check", "none.jsonl", "--base", NAME), "no such file"),
    ],
)
def test_a_users_mistake_is_one_line_and_no_traceback(
    trained: tuple[Home, Recipe], arguments: tuple[str, ...], word: str
) -> None:
    done = command(*arguments, "--home", str(trained[0].root))

    assert done.exit_code in (1, 2)
    assert word in done.output
    assert "Traceback" not in done.output


def test_data_check_takes_a_hub_id(trained: tuple[Home, Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    done = command("data", "check", "owner/name", "--home", str(trained[0].root), "--base", NAME)

    assert "to read it from the hub: pip install datasets" in done.output.replace("\n", " ")


def test_eval_measures_on_a_hub_dataset_and_its_split(
    trained: tuple[Home, Recipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, _subset: str | None, *, split: str, **_: Any) -> list[dict[str, str]]:
        asked.append((name, split))
        return [{"prompt": f"Question {number}", "completion": "Answer."} for number in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    words = ["eval", "owner/name", "-a", "tiny", "--no-base", "--home", str(trained[0].root)]

    done = command(*words, "--split", "test", "--out", str(tmp_path / "out.json"))

    assert done.exit_code == 0, done.output
    assert set(asked) == {("owner/name", "test")}
    assert json.loads((tmp_path / "out.json").read_text())["examples"] == 3
    assert {report["data"] for report in kept(trained[0].evaluations, ["tiny"])} >= {"owner/name"}


def test_eval_of_a_hub_dataset_without_the_package_says_what_to_install(
    trained: tuple[Home, Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    done = command("eval", "owner/name", "-a", "tiny", "--home", str(trained[0].root))

    assert "to read it from the hub: pip install datasets" in done.output.replace("\n", " ")
