"""Training speed on CPU: onebase against plain Trainer + PEFT + bitsandbytes, same rows, same steps, same LoRA.

    python bench/train_cpu.py [--steps 6] [--recipe training/recipes/captain.yaml] [--out bench/results/train_cpu.json]

Both arms are warmed up by one step. Tokens are real ones, without padding. CPU seconds stand beside the wall clock:
they hardly change when other processes share the cores. The plain arm is what PEFT's and transformers' guides show:
prepare_model_for_kbit_training, padded batches, transformers' own loss, no packing.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from onebase.base_fetch import find_base
from onebase.base_model import load_base
from onebase.home import Home, default_home
from onebase.tokenizer import TextTokenizer
from onebase_training.assemble import prepare, read_data, tokens_at_once
from onebase_training.config import Recipe, load_recipe
from onebase_training.plan import make_plan
from onebase_training.rows import Row
from onebase_training.trainer import StepDataset

ROOT = Path(__file__).parents[1]


def timed(step: Any, batches: list[Any]) -> tuple[float, float, list[float]]:
    """Wall seconds, CPU seconds, losses; the first batch warms up and is not timed."""
    losses = [step(batches[0])]
    wall, cpu = time.perf_counter(), time.process_time()
    losses += [step(batch) for batch in batches[1:]]
    return time.perf_counter() - wall, time.process_time() - cpu, losses


def ours(recipe: Recipe, rows: list[Row], plan: Any, base: Any) -> Any:
    torch.manual_seed(recipe.train.seed)
    objective = prepare(base, recipe).train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=recipe.train.learning_rate)
    size = tokens_at_once(recipe, base, 2048)
    steps = StepDataset(rows, plan, recipe.train, tokens_at_once=size, pad_id=base.tokenizer.pad_id)

    def step(number: int) -> float:
        total = 0.0
        for batch in steps[number]:
            loss = objective(batch).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def plain(recipe: Recipe, rows: list[Row], plan: Any, base: Any) -> Any:
    import peft

    torch.manual_seed(recipe.train.seed)
    model = peft.prepare_model_for_kbit_training(base.model, use_gradient_checkpointing=False)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    named = recipe.lora.target_modules
    config = peft.LoraConfig(
        r=recipe.lora.r,
        lora_alpha=int(recipe.lora.alpha),
        lora_dropout=0.0,
        target_modules=targets if named == "all-linear" else list(named),
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, config)
    args = transformers.TrainingArguments(
        output_dir="/tmp/onebase-bench", use_cpu=True, report_to=[], save_strategy="no"
    )
    trainer = transformers.Trainer(model=model, args=args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=recipe.train.learning_rate)

    def step(number: int) -> float:
        chosen = [rows[i] for i in plan.steps[number]]
        width = max(map(len, chosen))
        ids = torch.full((len(chosen), width), base.tokenizer.pad_id)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, row in enumerate(chosen):
            ids[i, : len(row)] = torch.from_numpy(row.ids)
            labels[i, : len(row)] = torch.where(torch.from_numpy(row.learnt), ids[i, : len(row)], -100)
            mask[i, : len(row)] = 1
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        loss = trainer.training_step(model, batch, num_items_in_batch=labels[:, 1:].ne(-100).sum())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "training/recipes/captain.yaml")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--home", type=Path, default=default_home(os.environ))
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/train_cpu.json")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe)
    spec = find_base(Home(options.home).create(), recipe.base)
    dataset = read_data(recipe, spec, TextTokenizer.load(spec.path))
    rows = [row for row, _ in dataset.train]
    plan = make_plan([weight for _, weight in dataset.train], recipe.train)
    numbers = list(range(options.steps + 1))
    tokens = sum(len(rows[i]) for number in numbers[1:] for i in plan.steps[number])
    result: dict[str, Any] = {
        "when": time.strftime("%Y-%m-%d"),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "base": spec.id,
        "recipe": recipe.name,
        "lora": recipe.lora.model_dump(mode="json"),
        "steps": options.steps,
        "batch_size": recipe.train.batch_size,
        "tokens": tokens,
        "arms": {},
    }
    for name, arm in (("onebase", ours), ("plain", plain)):
        base = load_base(spec, "cpu")
        wall, cpu, losses = timed(arm(recipe, rows, plan, base), numbers)
        result["arms"][name] = {
            "tokens_per_s": round(tokens / wall, 1),
            "tokens_per_cpu_s": round(tokens / cpu, 1),
            "wall_s": round(wall, 2),
            "cpu_s": round(cpu, 2),
            "losses": [round(loss, 4) for loss in losses],
        }
        print(name, result["arms"][name])
    one, other = result["arms"]["onebase"], result["arms"]["plain"]
    result["ratio_wall"] = round(one["tokens_per_s"] / other["tokens_per_s"], 2)
    result["ratio_cpu"] = round(one["tokens_per_cpu_s"] / other["tokens_per_cpu_s"], 2)
    print("ratio (wall, CPU):", result["ratio_wall"], result["ratio_cpu"])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
