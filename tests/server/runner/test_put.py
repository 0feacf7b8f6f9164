"""Arrays on their way to the device keep their type and values, and big ones are pinned so that nobody waits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from onebase_server.engine.put import put  # noqa: E402

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64, np.bool_])
def test_values_and_types_are_kept(dtype: type) -> None:
    array = np.arange(24).reshape(4, 6)[:, ::2].astype(dtype)
    out = put(array, torch.device("cpu"))
    assert out.numpy().dtype == array.dtype
    assert np.array_equal(out.numpy(), array)


@pytest.mark.parametrize(("count", "pins"), [(1 << 13, False), ((1 << 13) + 1, True)])
def test_what_a_driver_does_not_take_along_is_pinned(count: int, pins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain_to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: asked.append("pin") or self)
    monkeypatch.setattr(
        torch.Tensor, "to", lambda self, device, non_blocking: asked.append(non_blocking) or plain_to(self, "cpu")
    )
    put(np.zeros(count), torch.device("cuda"))
    assert asked == (["pin", True] if pins else [True])
