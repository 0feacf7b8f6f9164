"""The order of a run: every row as often as asked, the same on every machine, and steps cut without loss."""

from collections import Counter

import numpy as np
import pytest

from onebase.errors import RecipeError
from onebase_training.config import TrainConfig
from onebase_training.plan import automatic_epochs, make_plan, micro_batches
from onebase_training.rows import Row


def rows(*lengths: int) -> list[Row]:
    return [Row(np.zeros(n, np.int32), np.ones(n, bool)) for n in lengths]


def shown(weights: list[float], **config: float) -> Counter[int]:
    return Counter(index for step in make_plan(weights, TrainConfig.model_validate(config)).steps for index in step)


def test_each_epoch_shows_each_row_once_in_another_order() -> None:
    plan = make_plan([1.0] * 10, TrainConfig(epochs=2, batch_size=4))

    assert [len(step) for step in plan.steps] == [4, 4, 2, 4, 4, 2]
    assert plan.epoch_ends == (3, 6)
    first, second = plan.steps[:3], plan.steps[3:]
    assert sorted(sum(first, ())) == sorted(sum(second, ())) == list(range(10))
    assert first != second


def test_the_order_depends_on_the_seed_alone() -> None:
    config = TrainConfig(epochs=3, seed=7)

    assert make_plan([1.0] * 50, config) == make_plan([1.0] * 50, config)
    assert make_plan([1.0] * 50, config) != make_plan([1.0] * 50, TrainConfig(epochs=3, seed=8))


def test_weights_say_how_often_a_row_is_shown() -> None:
    assert shown([1.0, 2.0, 0.5, 2.5], epochs=2, batch_size=3) == {0: 2, 1: 4, 2: 1, 3: 5}


@pytest.mark.parametrize("seed", range(5))
def test_a_small_file_of_low_weight_has_its_share_of_every_epoch(seed: int) -> None:
    weights = [1.0] * 50 + [0.1] * 20 + [0.4] * 5

    for epochs in (1, 2, 5, 10):
        seen = shown(weights, epochs=epochs, batch_size=4, seed=seed)
        assert all(seen[row] == epochs for row in range(50))
        assert sum(seen[row] for row in range(50, 70)) == pytest.approx(20 * 0.1 * epochs, abs=1)
        assert sum(seen[row] for row in range(70, 75)) == pytest.approx(5 * 0.4 * epochs, abs=1)
    assert all(seen[row] == 1 for row in range(50, 70))


def test_max_steps_is_reached_though_an_epoch_may_show_nothing() -> None:
    plan = make_plan([0.3], TrainConfig(max_steps=5, batch_size=2))

    assert [len(step) for step in plan.steps] == [1] * 5
    assert 0 not in plan.epoch_ends


def test_a_run_that_would_show_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"with these weights 1 epochs show no row"):
        make_plan([0.001], TrainConfig(epochs=1))


def test_part_of_an_epoch_is_part_of_its_rows() -> None:
    assert sum(shown([1.0] * 10, epochs=1.5, batch_size=5).values()) == 15


def test_max_steps_ends_the_run_there() -> None:
    plan = make_plan([1.0] * 10, TrainConfig(max_steps=7, batch_size=4))

    assert len(plan) == 7
    assert plan.epoch_ends[-1] == 7


@pytest.mark.parametrize(("count", "epochs"), [(1, 25), (10, 10), (33, 3), (100, 3), (9000, 2), (30000, 1)])
def test_automatic_epochs_follow_openais_rule(count: int, epochs: int) -> None:
    assert automatic_epochs(count) == epochs


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("limit", [1, 10, 25, 1000])
def test_micro_batches_hold_every_row_once_within_the_limit(limit: int, packing: bool) -> None:
    given = rows(3, 9, 4, 4, 12, 1, 7)

    groups = micro_batches(given, limit, packing=packing)

    assert sorted(index for group in groups for index in group) == list(range(7))
    for group in groups:
        lengths = [len(given[index]) for index in group]
        size = sum(lengths) if packing else max(lengths) * len(lengths)
        assert size <= limit or len(group) == 1
