"""A base without files, for what only names one: the adapters of `lora_folder` and of the scripted trainer fit it."""

from pathlib import Path

from onebase.bases import BaseSpec
from onebase.manifest import BaseIdentity


class ScriptedBase(BaseSpec):
    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return {"model.layers.0.self_attn.q_proj": (8, 8)}


IDENTITY = BaseIdentity(id="tiny/base", revision="1", config_hash="0" * 32, quantization="nf4-dq64")
SCRIPTED_BASE = ScriptedBase("tiny/base", Path("/nowhere"), IDENTITY, {})
