"""Whole runs on the tiny base: what is published, what is refused, and what a run leaves behind."""

import csv
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from onebase.adapter import AdapterFiles, validate_adapter
from onebase.bases import resolve_base
from onebase.errors import AdapterInvalid, DatasetError, RecipeError, TrainingError
from onebase.home import Home
from onebase.store import AdapterStore
from onebase_training import checkpoint
from onebase_training.assemble import training_arguments
from onebase_training.config import make_recipe
from onebase_training.publish import write_checked
from onebase_training.status import StatusWriter
from onebase_training.train import Run, RunOptions, RunResult, carry_out
from tiny_base import NAME, recipe, sharegpt_file

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return sharegpt_file(tmp_path / "data.jsonl")


def train(home: Home, file: Path, *, options: RunOptions | None = None, run: str = "run", **sections: Any) -> RunResult:
    folder = home.root.parent / run
    return carry_out(
        Run(
            make_recipe(recipe(file, **sections)),
            home,
            folder,
            StatusWriter(folder / "status.json"),
            Console(quiet=True),
            options or RunOptions(),
        )
    )


def status(home: Home, run: str = "run") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home.root.parent / run / "status.json").read_text())
    return content


def events(home: Home) -> list[dict[str, Any]]:
    lines = (home.root.parent / "run/status.json.events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_publishes_a_version_that_learnt(home: Home, data: Path) -> None:
    result = train(home, data)

    assert result.version is not None
    version = AdapterStore(home.adapters).resolve("tiny")
    assert version.id == "tiny@1"
    metrics = version.manifest.metrics
    assert float(metrics["eval_loss"] or 9) < 0.97 * float(metrics["base_loss"] or 0)
    assert version.manifest.training["train"]["batch_size"] == 4
    spec = resolve_base(home, NAME)
    validate_adapter(AdapterFiles.read(version.path), spec.linear_shapes, spec.identity)


def test_a_second_run_publishes_the_next_version_and_can_leave_the_current_one(home: Home, data: Path) -> None:
    train(home, data, train={"max_steps": 1})
    train(home, data, train={"max_steps": 1}, options=RunOptions(make_current=False, aliases=("ft:tiny:x",)))

    store = AdapterStore(home.adapters)
    assert (store.resolve("tiny").version, store.resolve("ft:tiny:x").version) == (1, 2)


def test_the_status_file_and_the_events_tell_the_run(home: Home, data: Path) -> None:
    train(home, data, train={"max_steps": 3, "eval_every": 2, "save_every": 2})

    told = status(home)
    assert (told["state"], told["version"], told["step"], told["total_steps"]) == ("succeeded", "tiny@1", 3, 3)
    assert told["trained_tokens"] > 0
    kinds = [event["type"] for event in events(home)]
    assert (kinds.count("metrics"), kinds.count("eval"), kinds.count("checkpoint")) == (3, 2, 1)


def test_the_result_file_has_openais_columns_and_the_curves_are_drawn(home: Home, data: Path) -> None:
    pytest.importorskip("matplotlib")
    train(home, data, train={"max_steps": 3, "eval_every": 2})

    with (home.root.parent / "run/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"]
    assert [bool(row["valid_loss"]) for row in rows] == [False, True, True]
    assert "tiny@1" in (home.root.parent / "run/README.md").read_text()
    assert (home.root.parent / "run/loss.png").read_bytes().startswith(b"\x89PNG")


def test_going_on_from_a_version_starts_where_it_ended(home: Home, data: Path) -> None:
    first = train(home, data)

    more = train(
        home, data, resume_from="tiny@1", run="more", train={"max_steps": 1, "learning_rate": 1e-9, "warmup": 0}
    )

    assert first.metrics["eval_loss"] == pytest.approx(more.metrics["eval_loss"], rel=1e-4)


def test_early_stopping_publishes_the_best_and_not_the_last(home: Home, data: Path) -> None:
    result = train(
        home,
        data,
        train={"epochs": 30, "learning_rate": 0.2, "schedule": "constant", "early_stopping": 2, "eval_every": 1},
    )

    assert int(result.metrics["steps"] or 0) < 150
    again = train(
        home, data, resume_from="tiny@1", run="again", train={"max_steps": 1, "learning_rate": 1e-9, "warmup": 0}
    )
    assert again.metrics["eval_loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-4)


def test_broken_data_fails_the_run_before_the_base_is_loaded(home: Home, tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"messages": [{"role": "usr", "content": "x"}]}\n')

    with pytest.raises(DatasetError):
        train(home, file)

    assert status(home)["state"] == "failed"
    assert status(home)["error"]["code"] == "invalid_training_file"
    assert "line 1: messages[0].role" in status(home)["error"]["message"]
    assert not AdapterStore(home.adapters).list()


def test_a_target_that_does_not_exist_lists_those_that_do(home: Home, data: Path) -> None:
    with pytest.raises(RecipeError, match="q_proj, k_proj"):
        train(home, data, lora={"target_modules": ["query"]})


def test_pitfall_4_an_adapter_holds_lora_tensors_only_and_no_id_is_outside_the_embedding(
    home: Home, data: Path
) -> None:
    result = train(home, data, train={"max_steps": 1})

    assert result.version is not None
    names = AdapterFiles.read(result.version.path).tensors
    assert names
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    assert len(names) == 2 * 7 * 2


def test_pitfall_12_a_loss_that_is_not_finite_ends_the_run_and_publishes_nothing(
    home: Home, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(home, data, train={"max_steps": 1})
    monkeypatch.setattr("onebase_training.trainer.token_weights", lambda rows, _: [float("nan")] * len(rows))

    with pytest.raises(TrainingError, match="the loss of step 1 is nan"):
        train(home, data)

    assert status(home)["error"]["code"] == "loss_not_finite"
    assert AdapterStore(home.adapters).resolve("tiny").id == "tiny@1"


def test_pitfall_15_a_pickle_in_a_checkpoint_runs_nothing(home: Home, data: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_every": 2}
    train(home, data, train=settings)
    saved = checkpoint.last_checkpoint(home.root.parent / "run")
    assert saved is not None
    assert not list(saved.glob("training_args*"))

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    torch.save({"state": Bomb()}, saved / "optimizer.pt")
    checkpoint.write_sums(saved)  # whoever can write there can write that too
    with pytest.raises(TrainingError, match=r"optimizer\.pt"):
        train(home, data, train=settings, options=RunOptions(resume=True))
    assert not (tmp_path / "exploded").exists()


def test_a_checkpoint_of_another_recipe_is_refused(home: Home, data: Path) -> None:
    train(home, data, train={"max_steps": 4, "save_every": 2})

    with pytest.raises(TrainingError, match=r"made by another recipe: train\.learning_rate was 0\.005 and is 0\.001"):
        train(
            home, data, train={"max_steps": 4, "save_every": 2, "learning_rate": 1e-3}, options=RunOptions(resume=True)
        )


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda t: {k: torch.zeros_like(v) for k, v in t.items()}, "every lora_B is zero"),
        (lambda t: {k: v / 0 for k, v in t.items()}, "is not finite"),
    ],
)
def test_pitfall_17_an_adapter_that_learnt_nothing_or_exploded_is_not_published(
    home: Home, data: Path, tmp_path: Path, spoil: Any, word: str
) -> None:
    from onebase.base_model import load_base
    from onebase_training.lora import attach_adapter

    base = load_base(resolve_base(home, NAME), compute_dtype="float32")
    model = attach_adapter(base, make_recipe(recipe(data)).lora)

    with pytest.raises(TrainingError, match=word):
        write_checked(model, spoil(checkpoint.adapter_tensors(model)), tmp_path / "adapter")


def test_pitfall_18_the_adapter_names_its_base_and_fits_no_other(home: Home, data: Path) -> None:
    result = train(home, data, train={"max_steps": 1})

    assert result.version is not None
    files = AdapterFiles.read(result.version.path)
    assert files.config.base_model_name_or_path == NAME
    spec = resolve_base(home, NAME)
    other = spec.identity.model_copy(update={"id": "other", "config_hash": "0" * 32})
    with pytest.raises(AdapterInvalid, match="tiny-llama"):
        validate_adapter(files, spec.linear_shapes, other)


def test_pitfall_19_a_whole_run_needs_no_network(home: Home, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    assert train(home, data, train={"max_steps": 2}).state == "succeeded"


def test_pitfall_20_the_longest_row_goes_first_and_leaves_no_trace(home: Home, data: Path) -> None:
    plain = train(home, data, train={"max_steps": 2}, lora={"dropout": 0.1})
    checked = train(
        home, data, train={"max_steps": 2}, lora={"dropout": 0.1}, compute={"preflight": True}, run="checked"
    )

    assert plain.version is not None
    assert checked.version is not None
    assert plain.version.manifest.weights_sha256 == checked.version.manifest.weights_sha256


def test_pitfall_20_too_little_memory_is_said_with_advice(
    home: Home, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("onebase_training.objective.Objective.forward", no_memory)

    with pytest.raises(TrainingError, match=r"tokens at once do not fit in the memory of cpu.*tokens_at_once \(auto\)"):
        train(home, data, compute={"preflight": True}, train={"eval_every": "never"})
    assert status(home)["error"]["code"] == "out_of_memory"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")]
)
def test_pitfall_20_memory_that_runs_out_in_a_step_says_which_settings_take_less(
    home: Home, data: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_memory(*_: object) -> None:
        raise error

    monkeypatch.setattr("onebase_training.trainer.PlanTrainer.training_step", no_memory)

    with pytest.raises(TrainingError, match=r"data\.max_tokens.*gradient_checkpointing: true.*keep_dequantized: false"):
        train(home, data, train={"eval_every": "never"})

    told = status(home)["error"]
    assert told["code"] == "out_of_memory"
    assert "Lower train.tokens_at_once (auto)" in told["message"]


def test_the_seed_preset_trains_all_tokens_with_the_seeds_lora(home: Home, data: Path) -> None:
    result = train(
        home,
        data,
        preset="seed",
        train={"epochs": 2, "batch_size": 4, "warmup": 1},
        lora={},
        data={"eval_fraction": 0.2},
    )

    assert result.version is not None
    config = AdapterFiles.read(result.version.path).config
    assert sorted(config.target_modules or ()) == ["k_proj", "q_proj", "v_proj"]
    assert list((home.root.parent / "run").rglob("events.out.tfevents*")), "tensorboard is on, as in the seed"


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "sgd"])
def test_optimisers_are_chosen_by_trainers_names(home: Home, data: Path, optimizer: str) -> None:
    result = train(home, data, train={"optimizer": optimizer, "max_steps": 4, "learning_rate": 1e-2})

    assert float(result.metrics["eval_loss"] or 9) < float(result.metrics["base_loss"] or 0)


def test_an_optimiser_that_does_not_exist_is_told(home: Home, data: Path) -> None:
    with pytest.raises(RecipeError, match=r"train\.optimizer.*adamw_8bit"):
        train(home, data, train={"optimizer": "adamw9"})


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_a_schedule_warms_up_and_ends_as_it_should(home: Home, data: Path, schedule: str) -> None:
    train(home, data, train={"schedule": schedule, "max_steps": 8, "warmup": 4, "eval_every": "never"})

    rates = [event["learning_rate"] for event in events(home) if event["type"] == "metrics"]
    assert rates[0] < rates[3]
    assert (rates[-1] < rates[4]) == (schedule in ("linear", "cosine"))


def test_the_seed_presets_trainer_arguments_are_the_seeds(tmp_path: Path) -> None:
    """QloraTrainer.py of georgesung/llm_qlora, cc6683e; accumulation and evaluation are made in our step."""
    seed = make_recipe({"name": "x", "preset": "seed", "data": {"train": "d.jsonl"}})

    args = training_arguments(seed, tmp_path, 8750, torch.device("cpu"))

    assert (args.learning_rate, args.warmup_steps, str(args.lr_scheduler_type.value)) == (2e-4, 100, "linear")
    assert (args.max_grad_norm, args.weight_decay, args.seed) == (1.0, 0.0, 42)
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon) == (0.9, 0.999, 1e-8)
    assert str(args.optim.value if hasattr(args.optim, "value") else args.optim) == "adamw_torch"
    assert args.report_to == ["tensorboard"]
    assert args.logging_nan_inf_filter is False
