"""transformers' Trainer on a plan: one of its batches is one optimiser step, cut into micro-batches here.

Trainer brings optimisers by name, schedules, clipping, callbacks, checkpoints' contents and several devices. What
is replaced is where it is known to go wrong for QLoRA: loss normalisation (pitfall 10), hidden NaNs (12), half-written
or pickled checkpoints (14, 15), data order on resume (14).
"""

import contextlib
import math
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Dataset

from onebase.errors import TrainingError
from onebase_training import checkpoint as ck
from onebase_training.batches import MicroBatch, collate, token_weights
from onebase_training.config import TrainConfig
from onebase_training.held_out import held_out_metrics
from onebase_training.objective import Objective
from onebase_training.plan import Plan, micro_batches
from onebase_training.rows import Row
from onebase_training.same_recipe import require_same_recipe, write_made_with


class StepDataset(Dataset[list[MicroBatch]]):
    """Item k is step k of the plan as this process's micro-batches."""

    def __init__(
        self,
        rows: Sequence[Row],
        plan: Plan,
        config: TrainConfig,
        *,
        tokens_at_once: int,
        pad_id: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self._rows, self._plan, self._config = rows, plan, config
        self._tokens, self._pad_id = tokens_at_once, pad_id
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return len(self._plan)

    def longest_row(self) -> int:
        return max(len(row) for row in self._rows)

    def heaviest(self) -> MicroBatch:
        """The one with the most tokens of all steps, padding counted; of those the one with the longest row."""

        def weight(group: Sequence[Row]) -> tuple[int, int]:
            longest = max(map(len, group))
            return (sum(map(len, group)) if self._config.packing else longest * len(group)), longest

        sizes = [max(weight(rows) for rows, _ in self._cut(step)) for step in range(len(self))]
        heaviest = max(range(len(self)), key=lambda step: sizes[step])
        return max(self[heaviest], key=lambda batch: batch.ids.numel())

    def __getitem__(self, step: int) -> list[MicroBatch]:
        packing, pad_id = self._config.packing, self._pad_id
        return [collate(rows, shares, packing=packing, pad_id=pad_id) for rows, shares in self._cut(step)]

    def _cut(self, step: int) -> list[tuple[list[Row], list[float]]]:
        """The step's micro-batches as rows and the weight of each row's learnt tokens."""
        whole = [self._rows[index] for index in self._plan.steps[step]]
        weights = token_weights(whole, self._config.normalize)
        mine = list(range(self._rank, len(whole), self._world))
        if not mine:  # fewer rows than processes: go through one row with no weight, so that all processes meet
            mine, weights = [0], [0.0] * len(whole)
        rows, shares = [whole[i] for i in mine], [weights[i] for i in mine]
        groups = micro_batches(rows, self._tokens, packing=self._config.packing)
        return [([rows[i] for i in group], [shares[i] for i in group]) for group in groups]


class PlanTrainer(transformers.Trainer):  # type: ignore[misc]
    """`objective` wraps the PeftModel. `eval_batches` may be empty. `made_with` guards checkpoints (same_recipe.py)."""

    def __init__(
        self,
        objective: Objective,
        args: Any,
        steps: StepDataset,
        *,
        eval_batches: Sequence[MicroBatch],
        keep_checkpoints: int,
        made_with: Mapping[str, Any],
        callbacks: list[Any],
    ) -> None:
        super().__init__(model=objective, args=args, train_dataset=steps, callbacks=callbacks)
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.ProgressCallback)
        self.steps = steps
        self.eval_batches = eval_batches
        self._keep = keep_checkpoints
        self._made_with = made_with
        self.session_tokens = 0
        """Tokens since this process started."""
        self.last_loss = math.nan
        self.on_part: Callable[[int, float, float | None], None] = lambda step, share, loss: None
        """Told how much of a step is done, micro-batch by micro-batch, and its loss so far where that costs no wait."""
        self.asks_to_stop: Callable[[], bool] = lambda: False
        """Whether this process has been asked to."""
        self.stops = False
        """What all processes have agreed on, step by step: none goes on while another leaves."""
        self._last_accuracy = math.nan

    @property
    def trained_tokens(self) -> int:
        """Of all processes since the run began, before a resume too."""
        return int(self.state.num_input_tokens_seen)

    def keep_best(self) -> None:
        """The adapter as it is now, whole or not at all, in the run's folder."""
        ck.save_best(self.model.model, Path(self.args.output_dir), self.state.global_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs["accuracy"] = self._last_accuracy
        super().log(logs, start_time)

    def get_train_dataloader(self) -> DataLoader[list[MicroBatch]]:
        """In the plan's order, one step an item; every process builds its own share of each step."""
        return DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_only)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """All micro-batches of one step. Returns the step's loss; raises TrainingError when it is not finite."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        correct = torch.zeros((), device=self.args.device)
        learnt = tokens = 0
        nll = 0.0
        for index, batch in enumerate(inputs):
            last = index == len(inputs) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                losses = model(batch.to(self.args.device))
                # DistributedDataParallel takes the mean over processes; the weights already are shares of the whole.
                self.accelerator.backward(losses.loss * self.args.world_size)
            total += losses.loss.detach()
            correct += losses.correct
            learnt += len(batch.targets)
            tokens += batch.tokens
            if total.device.type == "cpu":
                nll += losses.nll_sum.item()
            so_far = nll / max(1, learnt) if total.device.type == "cpu" else None
            self.on_part(self.state.global_step, (index + 1) / len(inputs), so_far)
        sums = torch.stack((total, correct))
        asked = int(self.asks_to_stop())
        if self.args.world_size > 1:
            own = torch.tensor([learnt, tokens, asked], dtype=sums.dtype, device=sums.device)
            sums = self.accelerator.reduce(torch.cat((sums, own)), reduction="sum")
            total, (learnt, tokens, asked) = sums[0], (int(value) for value in sums[2:].tolist())
        loss, right = sums[:2].tolist()  # the step's one wait for the device
        self.stops = bool(asked)
        self.session_tokens += tokens
        self.state.num_input_tokens_seen += tokens
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.state.global_step + 1} is {loss}: training stopped, nothing "
                "published. A lower learning_rate or max_grad_norm usually helps",
                code="loss_not_finite",
            )
        self.last_loss, self._last_accuracy = loss, right / max(1, learnt)
        return total

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Response loss and token accuracy of the held-out rows, each learnt token counting the same.

        Empty when it was asked to stop: a checkpoint is saved then, and a resumed run makes up for it (progress.py).
        """
        alone = self.args.world_size == 1  # several would not stop at the same place
        metrics = held_out_metrics(
            self.model, self.eval_batches, self.args.device, stopped=lambda: alone and self.asks_to_stop()
        )
        if not metrics:
            self.stops = True
            self.control.should_evaluate = False
            self.control.should_save = self.control.should_training_stop = True
            return {}
        self.log(dict(metrics))
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        ck.save_adapter(self.model.model, Path(output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Into a hidden folder first; `commit_checkpoint` makes it appear whole."""
        run = Path(self.args.output_dir)
        staging = run / ck.STAGING
        staged = staging / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(staging, ignore_errors=True)  # what a crash left half written
        self.accelerator.wait_for_everyone()
        try:
            with _changed(self.args, "output_dir", str(staging)):
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                write_made_with(staged, self._made_with)
                ck.commit_checkpoint(staged, run, self._keep)
        except BaseException:  # a full disk needs the room
            shutil.rmtree(staging, ignore_errors=True)
            raise
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _no_pickles(f"optimizer.pt or scheduler.pt in {checkpoint}"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _no_pickles(f"rng_state.pth in {checkpoint}"):
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        require_same_recipe(Path(resume_from_checkpoint), self._made_with)
        ck.load_adapter_tensors(self.model.model, Path(resume_from_checkpoint))


@contextlib.contextmanager
def _no_pickles(files: str) -> Any:
    """torch refuses to run what a pickle asks for (pitfall 15); the user gets to know which file it was."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise TrainingError(f"{files} can't be loaded without running code from it, so it was not: {error}") from error


def _only(items: list[list[MicroBatch]]) -> list[MicroBatch]:
    return items[0]


@contextlib.contextmanager
def _changed(target: Any, name: str, value: Any) -> Any:
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)
