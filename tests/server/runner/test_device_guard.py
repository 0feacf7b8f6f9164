"""Which errors of a device end the engine, and that each thread that calls a runner is bound to its device."""

import threading

import pytest

torch = pytest.importorskip("torch")

from onebase.errors import AdapterInvalid  # noqa: E402
from onebase_server.engine.device_guard import DeviceGuard  # noqa: E402
from onebase_server.engine.runner import DeviceLost  # noqa: E402
from onebase_server.kernels.cuda_build import CudaBuildError  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(thread, device) of each call of `set_device`."""
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((threading.current_thread().name, str(device)))
    )
    return calls


def guard(device: str) -> DeviceGuard:
    return DeviceGuard(torch.device(device))


FAULTS = [torch.AcceleratorError("an illegal memory access"), CudaBuildError("launch failed")]


@pytest.mark.parametrize("error", FAULTS, ids=["torch", "driver"])
def test_a_fault_is_a_lost_device_in_steps_and_loads(error: Exception, bound: list[tuple[str, str]]) -> None:
    for where in (guard("cuda:1").step, guard("cuda:1").loading):
        with pytest.raises(DeviceLost, match=str(error)), where():
            raise error
    with pytest.raises(type(error)), guard("cpu").step():
        raise error


def test_no_memory_fails_a_step_only_but_a_load_has_nothing_else_to_fail(bound: list[tuple[str, str]]) -> None:
    with pytest.raises(torch.OutOfMemoryError), guard("cuda").step():
        raise torch.OutOfMemoryError("no")
    with pytest.raises(DeviceLost, match="ONEBASE_KV_TOKENS"), guard("cuda").loading():
        raise torch.OutOfMemoryError("no")


def test_what_is_wrong_with_an_adapter_stays_its_own(bound: list[tuple[str, str]]) -> None:
    with pytest.raises(AdapterInvalid), guard("cuda").loading():
        raise AdapterInvalid("a", ["not finite"])


def test_each_thread_is_bound_once_to_the_runners_own_device(bound: list[tuple[str, str]]) -> None:
    one = guard("cuda:1")

    def work() -> None:
        for _ in range(3):
            with one.step():
                pass
            with one.loading():
                pass

    threads = [threading.Thread(target=work, name=name) for name in ("load", "engine")]
    for thread in threads:
        thread.start()
        thread.join()
    assert bound == [("load", "cuda:1"), ("engine", "cuda:1")]


def test_a_cpu_is_bound_to_nothing(bound: list[tuple[str, str]]) -> None:
    with guard("cpu").loading():
        pass
    assert bound == []
