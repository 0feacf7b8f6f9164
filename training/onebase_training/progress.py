"""What a run shows while it goes: a bar with loss, tokens/s and time left, the status file, events, evaluations.

One Trainer callback, which also says when to evaluate, to save and to stop.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from onebase_training.config import TrainConfig
from onebase_training.plan import Plan
from onebase_training.status import StatusWriter
from onebase_training.stop import StopRequest

LINE_S: Final = 10.0
"""Between lines where there is no terminal for a bar; the first and the last step always have one."""


class _TimeLeft(ProgressColumn):
    """Counts down from the last step's estimate, so that a long step shows its own passing."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        if ends is None:
            return Text("--:-- left", style="progress.remaining")
        return Text(f"{_clock(ends - time.monotonic())} left", style="progress.remaining")


def _clock(seconds: float) -> str:
    """`05:09`, or `1:05:09`."""
    minutes, left = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes:02}:{left:02}"


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
        self._line_at = -math.inf
        self.trainer: Any = None
        self._best_loss = math.inf
        self._without_better = 0

    def asks_to_stop(self) -> bool:
        """Whether this process has been asked to end its run."""
        return self._stop.asked

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
        if self._is_evaluation_missing(state):
            self.trainer.evaluate()

    def _is_evaluation_missing(self, state: Any) -> bool:
        """A run that goes on may have been stopped before, or during, the evaluation of its last step."""
        done = any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
        return state.global_step > 0 and not done and self._is_due(self._config.eval_every, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._guard()
        step = state.global_step
        self._show(step)
        finished = step == len(self._plan)
        control.should_log = finished or step % self._config.log_every == 0 or step == 1
        if self.trainer.stops:
            control.should_training_stop = control.should_save = True
            return
        control.should_evaluate = self._is_due(self._config.eval_every, step)
        control.should_save = _due(self._config.save_every, step, step in self._plan.epoch_ends, False)

    def _is_due(self, eval_every: int | str, step: int) -> bool:
        finished = step == len(self._plan)
        return self._has_eval and _due(eval_every, step, step in self._plan.epoch_ends, finished)

    def on_part(self, step: int, share: float, loss: float | None) -> None:
        """So much of the step that follows `step` is done; `loss`: of that part, if it is known."""
        self._bar.update(self._task, completed=step + share)
        if loss is not None:
            self._bar.update(self._task, loss=f"{loss:.3f}")

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
        now, last = time.monotonic(), step == len(self._plan)
        if not self._console.is_terminal and (last or now - self._line_at >= LINE_S):
            self._line_at = now
            left = "" if last else f"  {_clock(self._left)} left"
            self._console.print(f"step {step}/{len(self._plan)}  loss {loss:.3f}  {self._rate:,.0f} tok/s{left}")

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
