"""How a training process makes way: policies on a clock of the test's own, with a server's real note. No torch."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from onebase.serving_note import ServerNote
from onebase.train_policy import LEAST_SHARES, policy_of
from onebase_training.yielding import STUCK_S, Yielder

CORE = Path(__file__).parents[2] / "core"


class World:
    """A clock, and a server that does what the test says while the trainer sleeps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 100.0
        self.slept = 0.0
        self.signs = 0
        self.steps = 0
        self.note = ServerNote.open(folder)
        self.while_asleep: Callable[[], None] = self.serve
        self.hurries = False

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.while_asleep()

    def serve(self, running: int = 1) -> None:
        self.steps += 1
        self.note.tell(running, 0, self.steps)

    def sign(self) -> None:
        self.signs += 1

    def yielder(self, policy: str, device: str = "cpu") -> Yielder:
        return Yielder(
            self.folder,
            policy,
            device,
            hurries=lambda: self.hurries,
            on_wait=self.sign,
            clock=lambda: self.now,
            sleep=self.sleep,
        )

    def train(self, yielder: Yielder, layers: int, each_s: float = 0.05) -> float:
        """So many layers; the share of the time that was trained."""
        begin = self.now
        for _ in range(layers):
            self.now += each_s
            yielder.at_boundary()
        return layers * each_s / (self.now - begin)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "serving")
    yield world
    world.note.close()


@pytest.mark.parametrize("policy", [*LEAST_SHARES, "0.7"])
def test_nobody_waits_for_an_idle_server(world: World, policy: str) -> None:
    assert world.train(world.yielder(policy), layers=20) == pytest.approx(1.0)


@pytest.mark.parametrize(("policy", "share"), [("serve-first", 0.1), ("fair", 0.5), ("train-first", 1.0), ("0.7", 0.7)])
def test_under_endless_load_training_keeps_its_policys_share(world: World, policy: str, share: float) -> None:
    world.serve()
    assert world.train(world.yielder(policy), layers=20) == pytest.approx(share, rel=0.02)


@pytest.mark.parametrize(
    ("policy", "sequences", "share"),
    [
        ("serve-first", 5, 0.9375),
        ("serve-first", 10, 0.75),
        ("serve-first", 16, 0.36),
        ("serve-first", 20, 0.1),
        ("serve-first", 400, 0.1),
        ("fair", 10, 0.75),
        ("fair", 16, 0.5),
        ("0.2", 1, 0.2),  # a number is the same under any load
    ],
)
def test_on_a_gpu_training_keeps_what_few_requests_leave(
    world: World, policy: str, sequences: int, share: float
) -> None:
    world.note.ready({"device": "cuda:0"})
    world.while_asleep = lambda: world.serve(running=sequences)
    world.serve(running=sequences)
    assert world.train(world.yielder(policy, "cuda"), layers=50) == pytest.approx(share, rel=0.02)


def test_the_requests_of_all_servers_on_the_device_count(world: World) -> None:
    second = ServerNote.open(world.folder)
    for note in (world.note, second):
        note.ready({"device": "cuda:0"})

    def serve() -> None:
        world.serve(running=5)
        second.tell(0, 10, world.steps)

    world.while_asleep = serve
    serve()
    assert world.train(world.yielder("serve-first", "cuda"), layers=50) == pytest.approx(1 - 0.75**2, rel=0.02)
    second.close()


def test_the_wait_shrinks_with_the_requests(world: World) -> None:
    """Half of a wait is over when all but ten of the twenty end: the rest is what ten are worth."""
    world.note.ready({"device": "cuda:0"})
    world.while_asleep = lambda: world.serve(running=20 if world.slept < 0.01 else 10)
    world.serve(running=20)
    world.train(world.yielder("serve-first", "cuda"), layers=1, each_s=0.06)
    assert world.slept == pytest.approx(0.02, abs=0.001)


def test_it_knows_whether_it_holds_training_back(world: World) -> None:
    yielder = world.yielder("fair")
    assert not yielder.holds_back
    world.serve()
    world.train(yielder, layers=2)
    assert yielder.holds_back
    world.serve(running=0)
    world.train(yielder, layers=1)
    assert yielder.holds_back, "a moment after the last request"
    world.train(yielder, layers=21)
    assert not yielder.holds_back


@pytest.mark.parametrize("each_s", [0.002, 0.3])
def test_the_share_is_the_same_for_fast_and_slow_layers(world: World, each_s: float) -> None:
    world.serve()
    assert world.train(world.yielder("serve-first"), layers=10, each_s=each_s) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("policy", ["", "serve", "0", "-1", "1.1", "nan", "inf"])
def test_a_policy_that_is_none_says_what_may_stand_there(policy: str) -> None:
    with pytest.raises(ValueError, match=r"must be serve-first, fair, train-first, or a share .* from 0.01 to 1"):
        policy_of(policy)


def test_training_goes_on_as_soon_as_the_last_request_has_ended(world: World) -> None:
    world.serve()
    world.while_asleep = lambda: world.serve(running=int(world.slept < 0.1))
    yielder = world.yielder("serve-first")
    world.train(yielder, layers=1)
    assert world.slept == pytest.approx(0.1, abs=0.005)
    assert yielder.waited_s == pytest.approx(world.slept)
    assert world.signs > 10


def test_waiting_requests_count_as_running_ones_do(world: World) -> None:
    world.note.tell(0, 4, 1)
    world.while_asleep = lambda: world.note.tell(0, 4, int(world.now * 1000))
    assert world.train(world.yielder("fair"), layers=10) == pytest.approx(0.5, rel=0.02)


def test_the_time_before_a_request_came_is_not_held_against_training(world: World) -> None:
    yielder = world.yielder("serve-first")
    world.train(yielder, layers=1000)
    world.serve()
    world.train(yielder, layers=1)
    assert world.slept == pytest.approx(9 * 0.05, rel=0.02)


def test_a_server_that_makes_no_step_is_not_waited_for_any_longer(world: World) -> None:
    world.serve()
    world.while_asleep = lambda: None
    yielder = world.yielder("serve-first")
    world.train(yielder, layers=1, each_s=2.0)
    assert world.slept == pytest.approx(STUCK_S, abs=0.01)
    world.train(yielder, layers=5)
    assert world.slept == pytest.approx(STUCK_S, abs=0.01)


def test_a_dead_servers_busy_note_blocks_nobody(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from onebase.serving_note import ServerNote\n"
        f"ServerNote.open(Path({str(tmp_path)!r})).tell(3, 0, 9); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(CORE)}).returncode == -9
    assert len(list(tmp_path.glob("*.load"))) == 1
    clock = iter(range(100))
    yielder = Yielder(tmp_path, "serve-first", "cpu", clock=lambda: float(next(clock)), sleep=pytest.fail)
    yielder.at_boundary()
    assert not yielder.has_servers


def test_a_server_that_stops_or_starts_during_a_run_is_noticed(world: World) -> None:
    yielder = world.yielder("fair")
    world.serve()
    world.train(yielder, layers=2)
    assert world.slept > 0
    world.note.close()
    world.while_asleep = lambda: None
    world.now += 2
    yielder.at_boundary()
    slept = world.slept
    assert world.train(yielder, layers=30) == pytest.approx(1.0)
    world.note = ServerNote.open(world.folder)
    world.serve()
    world.while_asleep = world.serve
    world.train(yielder, layers=30)
    assert world.slept > slept


def test_a_run_that_was_asked_to_stop_waits_no_more(world: World) -> None:
    world.serve()
    world.hurries = True
    assert world.train(world.yielder("serve-first"), layers=5) == pytest.approx(1.0)


@pytest.mark.parametrize(("device", "waits"), [("cuda:0", True), ("cuda", True), ("cuda:1", False), ("cpu", False)])
def test_only_servers_on_the_same_device_are_made_way_for(world: World, device: str, waits: bool) -> None:
    world.note.ready({"device": "cuda:0"})
    world.serve()
    world.train(world.yielder("fair", device), layers=3)
    assert (world.slept > 0) == waits
