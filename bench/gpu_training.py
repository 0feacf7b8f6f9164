"""QLoRA training on one GPU: plain PEFT beside onebase_training, at OpenLLaMA-7B's shape. One JSON line a figure.

    python bench/gpu_training.py [--out FILE]      # some 5 minutes on an H100; PYTHONPATH=core:training:tests
    python bench/gpu_training.py --tiny            # the same script in small, on any machine

First correctness: loss and gradients of both arms on a small random Llama, in fp32 and bf16. Then speed and loss curves
at the full shape: random weights quantised in place (their values do not change the speed). Tokens/s are real tokens,
padding not counted; the median step after warm-up. The plain arm is what PEFT's and bitsandbytes' guides show, without
Trainer's own overhead; ours runs through PlanTrainer with everything a run does.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch import Tensor

from onebase_training import preflight
from onebase_training.assemble import training_arguments
from onebase_training.batches import collate, token_weights
from onebase_training.plan import Plan
from onebase_training.rows import Row
from onebase_training.trainer import PlanTrainer, StepDataset
from training_arms import FULL, TINY, Arm, Shape, ours, plain

SEED_LORA: dict[str, Any] = {"r": 8, "alpha": 32, "dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj"]}
ALL_LINEAR: dict[str, Any] = {"r": 16, "alpha": 32, "target_modules": "all-linear"}
OUT: list[Any] = [sys.stdout]


def say(**figure: Any) -> None:
    for stream in OUT:
        print(json.dumps(figure), file=stream, flush=True)


def rows_of(lengths: Sequence[int], vocab: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [Row(rng.integers(3, vocab, n).astype(np.int32), np.arange(n) > 0) for n in lengths]


def short_conversations(count: int, longest: int, mean: float = 200.0) -> list[int]:
    """Lengths as chats have them: log-normal, many short ones and a long tail."""
    lengths = np.random.default_rng(5).lognormal(np.log(mean) - 0.32, 0.8, count)
    return [int(n) for n in np.clip(lengths, 16, longest)]


def padded_step(arm: Arm, rows: Sequence[Row], optimizer: Any, autocast: bool = True) -> float:
    """The guides' step: a padded batch, transformers' own loss."""
    device, width = arm.device, max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.int64), torch.full((len(rows), width), -100)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = labels[i, : len(row)] = torch.from_numpy(row.ids)
    mask = (labels >= 0).long().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = arm.model(input_ids=ids.to(device), attention_mask=mask, labels=labels.to(device)).loss
    loss.backward()
    if optimizer is not None:
        torch.nn.utils.clip_grad_norm_(arm.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


class Clock(transformers.TrainerCallback):  # type: ignore[misc]
    """When each step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append(time.perf_counter())
        control.should_log = True


def run_ours(arm: Arm, steps: Sequence[Sequence[Row]], *, packing: bool = True, tokens: int = 8192) -> dict[str, Any]:
    """Seconds of each step, losses, peak memory; through PlanTrainer."""
    assert arm.objective is not None
    rows = [row for step in steps for row in step]
    starts = np.cumsum([0, *map(len, steps)]).tolist()
    plan = Plan(tuple(tuple(range(a, b)) for a, b in pairwise(starts)), (len(steps),), 1.0)
    train = arm.recipe.train.model_copy(update={"packing": packing})
    dataset = StepDataset(rows, plan, train, tokens_at_once=tokens, pad_id=0)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(arm.recipe, Path(folder), len(steps), arm.device)
        clock = Clock()
        trainer = PlanTrainer(
            arm.objective, args, dataset, eval_batches=[], keep_checkpoints=1, made_with={}, callbacks=[clock]
        )
        preflight.check(trainer, arm.recipe, Console(stderr=True))
        peak_from_here(arm.device)
        start = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": np.diff([start, *clock.ends]).tolist(), "losses": losses, **memory(arm.device)}


def run_plain(arm: Arm, steps: Sequence[Sequence[Row]]) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(arm.parameters, lr=2e-4, weight_decay=0.0)
    peak_from_here(arm.device)
    seconds, losses = [], []
    for rows in steps:
        start = time.perf_counter()
        losses.append(padded_step(arm, rows, optimizer))
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses, **memory(arm.device)}


def peak_from_here(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    return {
        "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved_GB": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def figure(name: str, arm: Arm, steps: Sequence[Sequence[Row]], found: dict[str, Any], **more: Any) -> None:
    """The median of tokens/s over the steps after three of warm-up."""
    rates = [sum(map(len, step)) / s for step, s in zip(steps, found["seconds"], strict=True)][3:]
    kept = None if arm.objective is None or arm.objective.recompute is None else arm.objective.recompute.kept
    say(
        what=name, arm=arm.name, tok_s=round(median(rates)), lowest=round(min(rates)), highest=round(max(rates)),
        step_ms=round(median(found["seconds"][3:]) * 1e3, 1), layers_kept=kept, last_loss=round(found["losses"][-1], 4),
        **{k: v for k, v in found.items() if k.endswith("_GB")}, **more,
    )  # fmt: skip


def correctness(shape: Shape, device: torch.device) -> None:
    """Loss and gradients of our path against plain PEFT's on the same weights; fp32 must agree."""
    small = Shape(hidden=256, inner=512, layers=3, heads=4, kv_heads=2, vocab=1024)
    rows = rows_of([70, 130, 9, 64], small.vocab)
    lora = {"r": 8, "alpha": 16, "target_modules": "all-linear"}
    found: dict[tuple[str, str], tuple[float, dict[str, Tensor]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for make in (plain, ours):
            arm = make(small, device, lora, dtype=dtype, b_std=0.05)
            if arm.objective is None:
                loss = padded_step(arm, rows, None, autocast=False)
            else:
                batch = collate(rows, token_weights(rows, "tokens"), packing=True, pad_id=0).to(device)
                losses = arm.objective(batch)
                losses.loss.backward()
                loss = losses.loss.item()
            grads = {n.removeprefix("model."): p.grad.double() for n, p in arm.named if p.grad is not None}
            found[arm.name, str(dtype)] = loss, {n[n.index("layers.") :]: g for n, g in grads.items()}
    exact = found["plain", "torch.float32"]
    for key, (loss, grads) in found.items():
        assert set(grads) == set(exact[1])
        error = sum(float((g - exact[1][n]).square().sum()) for n, g in grads.items())
        relative = (error / sum(float(g.square().sum()) for g in exact[1].values())) ** 0.5
        say(check=key[0], dtype=key[1], loss=loss, loss_of_plain_fp32=exact[0], gradient_error=relative)
    assert abs(found["ours", "torch.float32"][0] - exact[0]) < 1e-4


def curves(shape: Shape, device: torch.device) -> None:
    """The same rows, order and first adapter; no dropout: both arms' losses step by step."""
    steps = [rows_of([shape.context // 4] * 4, shape.vocab, seed=i % 4) for i in range(24 if shape is FULL else 5)]
    lora = {**SEED_LORA, "dropout": 0.0}
    losses = {arm.name: run(arm, steps)["losses"] for arm, run in both(shape, device, lora)}
    gap = [abs(a - b) for a, b in zip(losses["plain"], losses["ours"], strict=True)]
    say(curves=losses, largest_gap=max(gap), mean_gap=sum(gap) / len(gap))


def both(shape: Shape, device: torch.device, lora: dict[str, Any]) -> Iterator[tuple[Arm, Callable[..., Any]]]:
    yield plain(shape, device, lora), run_plain
    collect()
    yield ours(shape, device, lora), run_ours
    collect()


def collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def speed(shape: Shape, device: torch.device) -> None:
    """The seed's LoRA and all-linear, at 4 x 1,024 and 1 x 2,048; ours within the goals' memory and with all of it."""
    count = 12 if shape is FULL else 5
    settings = [(4, shape.context // 2, 14.4), (1, shape.context, 8.9)]
    for name, lora in (("seed LoRA", SEED_LORA), ("all-linear r=16", ALL_LINEAR)):
        for batch, length, limit in settings:
            steps = [rows_of([length] * batch, shape.vocab, seed=i) for i in range(count)]
            what = f"{name}, {batch} x {length}"
            arm = plain(shape, device, lora)
            figure(what, arm, steps, run_plain(arm, steps))
            del arm
            collect()
            for memory_gb in (limit, None):
                arm = ours(shape, device, lora, memory_gb=memory_gb)
                figure(what, arm, steps, run_ours(arm, steps, tokens=batch * length), memory_gb=memory_gb)
                del arm
                collect()


def packing(shape: Shape, device: torch.device) -> None:
    """Conversations of 200 tokens on average, 4 to a padded batch as Trainer would have it, or packed."""
    longest, count = shape.context // 2, 10 if shape is FULL else 5
    lengths = short_conversations(count * 32, longest, mean=200.0 if shape is FULL else 24.0)
    rows = rows_of(lengths, shape.vocab)
    big, small = ([rows[i : i + n] for i in range(0, len(rows), n)] for n in (32, 4))
    mean = round(float(np.mean(lengths)), 1)
    arm = plain(shape, device, SEED_LORA)
    figure("short rows, padded 4 at a time", arm, small, run_plain(arm, small), mean_tokens=mean)
    del arm
    collect()
    for packed, steps, memory_gb in ((False, small, 14.4), (True, big, 14.4), (True, big, None)):
        arm = ours(shape, device, SEED_LORA, memory_gb=memory_gb)
        found = run_ours(arm, steps, packing=packed, tokens=8192 if packed else 4 * longest)
        what = "short rows, packed 32 a step" if packed else "short rows, padded 4 at a time"
        figure(what, arm, steps, found, memory_gb=memory_gb, mean_tokens=mean)
        del arm
        collect()


def unpacking(shape: Shape, device: torch.device) -> None:
    """Microseconds to unpack one weight, ours against bitsandbytes', and that the values are the same bits."""
    if device.type != "cuda":
        return
    import bitsandbytes.functional as bnb
    from triton.testing import do_bench

    from onebase_training import triton_unpack

    for out, into in ((4096, 4096), (11008, 4096), (4096, 11008)):
        weight = torch.randn(out, into, device=device, dtype=torch.bfloat16)
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
        equal = torch.equal(triton_unpack.unpack(packed, state, torch.bfloat16), bnb.dequantize_4bit(packed, state))
        us = do_bench(lambda p=packed, s=state: triton_unpack.unpack(p, s, torch.bfloat16), return_mode="median") * 1e3
        theirs = do_bench(lambda p=packed, s=state: bnb.dequantize_4bit(p, s), return_mode="median") * 1e3
        say(unpack=[out, into], ours_us=round(us, 1), bitsandbytes_us=round(theirs, 1), same_bits=equal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", help="comma-separated: correctness, unpacking, speed, packing, curves")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.out:
        OUT.append(options.out.open("a", encoding="utf-8"))
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    say(device=name, torch=torch.__version__, transformers=transformers.__version__)
    for section in (correctness, unpacking, speed, packing, curves):
        if options.only and section.__name__ not in options.only.split(","):
            continue
        start = time.perf_counter()
        try:
            section(TINY if options.tiny else FULL, device)
        except Exception:  # noqa: BLE001 - the sections after it are worth having
            traceback.print_exc()
            say(section=section.__name__, failed=traceback.format_exc(limit=-1).splitlines()[-1])
        collect()
        say(section=section.__name__, took_s=round(time.perf_counter() - start, 1))


if __name__ == "__main__":
    main()
