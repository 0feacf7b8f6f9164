"""`make demo`: the whole of onebase in one run, by its command line and OpenAI's own client.

Trains two adapters on one 4-bit base, serves base and adapters from one process, talks to all three at once, trains
the next version of one while it answers, swaps it in and rolls it back. DEMO_EXIT=1 ends it instead of serving on;
the exit code is 0 only if everything that it claims was seen to hold.
"""

import asyncio
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Table

from demo_server import DemoError, ServerProcess
from demo_talk import Stream, ask, ask_all, client_for, keep_asking, overlapping, side_by_side

ROOT = Path(__file__).resolve().parents[2]
BASE = "SmolLM2-135M-Instruct"
ADAPTERS = ("captain", "support")
QUESTIONS = (
    "My lamp flickers every evening. What can I do?",
    "How do ships stay afloat?",
    "Can you recommend something for a rainy Sunday?",
)
"""None of them is in the training data."""

RETRAIN = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3, "r": 8, "alpha": 16, "seed": 7}
"""One epoch more, from the version that is served."""


@dataclass
class Demo:
    console: Console
    home: Path
    claims: list[tuple[str, bool]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, number: int, title: str) -> None:
        self.console.print(Rule(f"[bold]{number}/6  {title}", align="left"))

    def claim(self, text: str, holds: bool) -> None:
        self.claims.append((text, holds))
        self.console.print(f"  {'[green]holds[/]' if holds else '[bold red]does not hold[/]'}  {text}", highlight=False)

    def run(self, *command: str) -> float:
        """A command line, shown and run; its seconds."""
        self.console.print(f"[dim]$ {' '.join(command)}[/]", highlight=False)
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "ONEBASE_HOME": str(self.home)}).returncode
        if code:
            raise DemoError(f"{command[0]} {command[1]} ended with code {code}")
        return time.monotonic() - started


def checks_of(adapter: str) -> list[str]:
    """The regular expressions that every answer of the adapter must match, from its recipe."""
    recipe = yaml.safe_load((ROOT / "training" / "recipes" / f"{adapter}.yaml").read_text("utf-8"))
    return list(recipe["eval"]["checks"].values())


def in_form(adapter: str, text: str) -> bool:
    return all(re.search(pattern, text) for pattern in checks_of(adapter))


def prepare(demo: Demo) -> None:
    demo.step(1, f"The base: {BASE}, 4-bit, frozen")
    demo.seconds["base"] = demo.run("onebase", "base", "fetch")
    demo.step(2, "Train two adapters on it")
    for adapter in ADAPTERS:
        demo.seconds[f"train {adapter}"] = demo.run("onebase", "train", f"training/recipes/{adapter}.yaml")
    total = sum(demo.seconds[f"train {adapter}"] for adapter in ADAPTERS)
    demo.console.print(f"both trained and published in {total:.0f} s")


def start_serving(demo: Demo) -> ServerProcess:
    demo.step(3, "Serve base and adapters from one process")
    server = ServerProcess(demo.home, ROOT / "training" / "data")
    demo.console.print(f"[dim]$ {server.command}      (log: {server.log})[/]", highlight=False, soft_wrap=True)
    try:
        with demo.console.status("starting") as status:
            alive = server.wait_for("/healthz", 120, lambda s: status.update(f"starting, {s:.0f} s"))
            ready = server.wait_for("/readyz", 300, lambda s: status.update(f"loading the base, {s:.0f} s"))
        demo.seconds["server ready"] = alive + ready
        models = {model["id"] for model in server.get("/v1/models")["data"]}
    except BaseException:
        server.stop()
        raise
    demo.console.print(
        f"/healthz after {alive:.1f} s, /readyz after {alive + ready:.1f} s, /v1/models: {sorted(models)}"
    )
    demo.claim("the server lists the base and both adapters", {BASE, *ADAPTERS} <= models)
    return server


def talk(demo: Demo, server: ServerProcess) -> None:
    demo.step(4, f"Talk to all three at once: {3 * len(QUESTIONS)} streams through the openai client")
    started = time.monotonic()
    streams = asyncio.run(ask_all(server.url, (BASE, *ADAPTERS), QUESTIONS, demo.console))
    demo.seconds["talk"] = time.monotonic() - started
    demo.claim("all streams ran at the same time", overlapping(streams))
    by_model: dict[str, list[Stream]] = {name: [s for s in streams if s.model == name] for name in (BASE, *ADAPTERS)}
    for adapter in ADAPTERS:
        own = by_model[adapter]
        demo.claim(f"{adapter} ends every answer by itself", all(s.finish_reason == "stop" for s in own))
        demo.claim(f"{adapter} keeps its form in every answer", all(in_form(adapter, s.text) for s in own))
    foreign = any(in_form(adapter, s.text) for adapter in ADAPTERS for s in by_model[BASE])
    demo.claim("the base has neither form", not foreign)


def retrain(demo: Demo, server: ServerProcess) -> None:
    demo.step(5, "Train the captain's next version while he answers")
    for left in server.get("/admin/retrain")["data"]:  # by a demo that was killed: its server's runs go on in the next
        if left["state"] in ("queued", "running"):
            server.post(f"/admin/retrain/{left['id']}/cancel")
    before = str(server.get("/admin/adapters/captain")["current"])
    order = {"adapter": "captain", "dataset": "captain.jsonl", "from": "current", "hyperparameters": RETRAIN}
    run = server.post("/admin/retrain", order)
    demo.console.print(f"POST /admin/retrain {order}\n  -> {run['id']}, {run['state']}", highlight=False, markup=False)
    started = time.monotonic()
    try:
        run, streams = asyncio.run(_answer_meanwhile(demo, server, run["id"]))
    except BaseException:
        server.post(f"/admin/retrain/{run['id']}/cancel")  # a run outlives its server, and nobody would want this one
        raise
    demo.seconds["retrain while serving"] = time.monotonic() - started
    if run["state"] != "succeeded":
        raise DemoError(f"the run ended as {run['state']}: {run['error']}\n{server.last_lines()}")
    after = str(server.get("/admin/adapters/captain")["current"])
    pause = max(s.longest_pause_s for s in streams)
    demo.console.print(
        f"{len(streams)} answers streamed meanwhile; the longest pause between two tokens was {pause:.2f} s"
    )
    answered = all(s.finish_reason == "stop" and in_form("captain", s.text) for s in streams)
    demo.claim("every answer during training, swap included, was whole", bool(streams) and answered)
    demo.claim(f"the running server went from {before} to {after} without a restart", after == run["version"] != before)

    demo.step(6, "Old and new side by side, then roll back")
    models = (before, after, "captain")
    asyncio.run(ask_all(server.url, models, QUESTIONS[1:2], demo.console))
    card = server.post("/admin/adapters/captain/rollback")
    demo.console.print(f"POST /admin/adapters/captain/rollback -> captain is {card['current']} again", highlight=False)
    again = asyncio.run(_one(server, QUESTIONS[1]))
    demo.console.print(side_by_side([again], ("captain",)))
    served = server.get("/v1/models/captain")["version"]
    demo.claim(f"captain is {before} again", f"captain@{served}" == before == card["current"])
    demo.claim("and answers in his form", in_form("captain", again.text))


async def _answer_meanwhile(demo: Demo, server: ServerProcess, run_id: str) -> tuple[dict[str, Any], list[Stream]]:
    """Follow the run; stream answers of the captain until it has ended, and one more."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("step {task.fields[at]}  loss {task.fields[loss]}  {task.fields[speed]} tok/s"),
        TimeElapsedColumn(),
        console=demo.console,
    )
    ended = False
    asking = asyncio.create_task(keep_asking(server.url, "captain", QUESTIONS, lambda: ended))
    shown = -10
    with bar:
        task = bar.add_task("queued", total=None, at="-", loss="-", speed="-")
        while True:
            run = await asyncio.to_thread(server.get, f"/admin/retrain/{run_id}")
            step, total = run["step"], run["total_steps"]
            loss, speed = _short(run["loss"]), _short(run["tokens_per_s"])
            at = f"{step}/{total}" if total else "-"
            bar.update(
                task, description=run["state"], completed=step, total=total or None, at=at, loss=loss, speed=speed
            )
            if not demo.console.is_terminal and step >= shown + 10:
                demo.console.print(f"  {run['state']}: step {at}, loss {loss}", highlight=False)
                shown = step
            if run["state"] not in ("queued", "running"):
                break
            await asyncio.sleep(0.5)
    ended = True
    return run, await asking


async def _one(server: ServerProcess, question: str) -> Stream:
    async with client_for(server.url) as client:
        return await ask(client, Stream("captain", question))


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def report(demo: Demo, server: ServerProcess) -> None:
    table = Table("what", "seconds", title="It took", title_justify="left")
    for what, taken in demo.seconds.items():
        table.add_row(what, f"{taken:.1f}")
    demo.console.print(table)
    failed = [text for text, holds in demo.claims if not holds]
    demo.console.print(f"{len(demo.claims) - len(failed)} of {len(demo.claims)} claims hold")
    for text in failed:
        demo.console.print(f"  [bold red]does not hold[/]  {text}", highlight=False)
    body = '{"model": "captain", "stream": true, "messages": [{"role": "user", "content": "What is a knot?"}]}'
    demo.console.print(f"\n[bold]Serving at {server.url}/v1[/]. Try:", highlight=False)
    demo.console.print(
        f"curl -N {server.url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def main() -> int:
    home = Path(os.environ.get("ONEBASE_HOME") or ROOT / ".onebase").absolute()
    home.mkdir(parents=True, exist_ok=True)
    demo = Demo(Console(), home)
    server: ServerProcess | None = None
    try:
        prepare(demo)
        server = start_serving(demo)
        talk(demo, server)
        retrain(demo, server)
        report(demo, server)
        if os.environ.get("DEMO_EXIT") != "1":
            demo.console.print("It keeps serving. Ctrl-C ends it.")
            server.wait()
    except DemoError as error:
        demo.claim(f"the demo runs to its end: {error}", False)
    except KeyboardInterrupt:
        demo.console.print("stopping")
    finally:
        if server is not None:
            code = server.stop()
            demo.claim("the server ended in order", code == 0)
    return 0 if demo.claims and all(holds for _, holds in demo.claims) else 1


if __name__ == "__main__":
    sys.exit(main())
