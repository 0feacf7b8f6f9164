"""What a run shows while it goes: a bar with loss, tokens/s and time left, the status file, events, evaluations.

One Trainer callback, which also says when to evaluate, to save and to stop.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from onebase_training.config import TrainConfig
from onebase_training.plan import Plan
from onebase_training.status import StatusWriter
from onebase_training.stop import StopRequest


class _TimeLeft(ProgressColumn):
    """Counts down from the last step's estimate, so that a long step shows its own passing."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        if ends is None:
            return Text("--:-- left", style="progress.remaining")
        minutes, seconds = divmod(max(0, round(ends - time.monotonic())), 60)
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
        return Text(f"{text} left", style="progress.remaining")


class RunCallback(transformers.TrainerCallback):  # type: ignore[misc]
    """Decides when to evaluate and save by the plan's epochs, keeps the best, stops early, and reports."""

    def __init__(
        self,
        plan: Plan,
        config: TrainConfig,
        status: StatusWriter,
        console: Console,
        stop: StopRequest,
        *,
        has_eval: bool,
        guard: Callable[[], None] = lambda: None,
    ) -> None:
        """`guard` raises when what was computed can't be trusted; it is asked before anything is kept."""
        self._plan, self._config, self._status, self._console = plan, config, status, console
        self._stop, self._has_eval, self._guard = stop, has_eval, guard
        self._times: deque[tuple[float, int]] = deque(maxlen=20)
        self._bar = Progress(
            TextColumn("[bold]step {task.fields[step]}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tok/s"),
            _TimeLeft(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=len(plan), step=0, loss="-", speed="-", ends=None)
        self._rate = self._left = 0.0
        self.trainer: Any = None
        self._best_loss = math.inf
        self._without_better = 0

    @property
    def stops_early(self) -> bool:
        return self._config.early_stopping is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._bar.start()
        self._bar.update(self._task, completed=state.global_step, step=state.global_step)
        self._times.append((time.monotonic(), self.trainer.trained_tokens))
        for entry in state.log_history:  # of the run before a resume
            if "eval_loss" in entry:
                self._judge(float(entry["eval_loss"]))
        self._status.enter("running", step=state.global_step, total_steps=len(self._plan))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._guard()
        step = state.global_step
        self._show(step)
        if self._stop.asked:
            control.should_training_stop = True
            control.should_save = self._stop.save
            return
        at_epoch_end = step in self._plan.epoch_ends
        finished = step == len(self._plan)
        control.should_log = finished or step % self._config.log_every == 0 or step == 1
        control.should_evaluate = self._has_eval and _due(self._config.eval_every, step, at_epoch_end, finished)
        control.should_save = _due(self._config.save_every, step, at_epoch_end, False)

    def on_part(self, step: int, share: float) -> None:
        """So much of the step that follows `step` is done."""
        self._bar.update(self._task, completed=step + share)

    def _show(self, step: int) -> None:
        """The bar and the status file after every step, whatever is logged."""
        self._rate, self._left = self._speed(step)
        loss, ends = self.trainer.last_loss, time.monotonic() + self._left
        self._bar.update(
            self._task, completed=step, step=step, loss=f"{loss:.3f}", speed=f"{self._rate:,.0f}", ends=ends
        )
        self._status.progress(
            step=step,
            loss=loss,
            tokens_per_s=round(self._rate, 1),
            eta_s=round(self._left, 1),
            epoch=round(self._plan.epochs * step / len(self._plan), 3),
            trained_tokens=self.trainer.trained_tokens,
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self._status.event(
            "metrics",
            {
                "step": state.global_step,
                "total_steps": len(self._plan),
                "train_loss": loss,
                "train_mean_token_accuracy": logs.get("accuracy"),
                "learning_rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
            },
        )
        if not self._console.is_terminal:
            self._console.print(
                f"step {state.global_step}/{len(self._plan)}  loss {loss:.3f}  {self._rate:,.0f} tok/s  "
                f"{self._left:,.0f} s left"
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._guard()
        loss, accuracy = metrics["eval_loss"], metrics["eval_accuracy"]
        self._console.print(
            f"step {state.global_step}: held-out response loss {loss:.4f}, token accuracy {accuracy:.1%}"
        )
        self._status.event(
            "eval",
            {
                "step": state.global_step,
                "total_steps": len(self._plan),
                "full_valid_loss": loss,
                "full_valid_mean_token_accuracy": accuracy,
            },
        )
        if self._judge(loss) and self.stops_early and self.trainer.is_world_process_zero():
            self.trainer.keep_best()
        if self._config.early_stopping is not None and self._without_better >= self._config.early_stopping:
            self._console.print(f"stopping early: no lower response loss in {self._without_better} evaluations")
            control.should_training_stop = True

    def _judge(self, loss: float) -> bool:
        """Whether it is the lowest so far."""
        if loss < self._best_loss:
            self._best_loss, self._without_better = loss, 0
            return True
        self._without_better += 1
        return False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = f"{args.output_dir}/checkpoint-{state.global_step}"
        self._status.progress(checkpoint=folder)
        self._status.event("checkpoint", {"step": state.global_step, "path": folder})

    def close(self) -> None:
        self._bar.stop()

    def _speed(self, step: int) -> tuple[float, float]:
        """Tokens a second over the last steps, and the seconds left at that rate."""
        now = time.monotonic()
        self._times.append((now, self.trainer.trained_tokens))
        (then, tokens), steps = self._times[0], max(1, len(self._times) - 1)
        seconds = max(1e-6, now - then)
        return (self.trainer.trained_tokens - tokens) / seconds, seconds / steps * (len(self._plan) - step)


def _due(every: int | str, step: int, at_epoch_end: bool, finished: bool) -> bool:
    if every == "never":
        return False
    if every == "epoch":
        return at_epoch_end or finished
    return finished or step % int(every) == 0
