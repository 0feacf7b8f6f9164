"""What users run without onebase, on the same NF4 model: transformers' generate, PEFT's generate and mixed batch.

Decoding only: the time of a generation with more tokens minus that of one with a single token.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Baselines:
    """Wraps the model with PEFT when the first adapter case runs; the model must not serve anything else."""

    def __init__(self, model: Any, adapters: list[Path], prompt: int, steps: int, clock: Callable[[], float]) -> None:
        self.model = model
        self.names = [path.name for path in adapters]
        self.prompt = prompt
        self.steps = steps
        self.clock = clock
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import peft

            self.peft = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name=self.names[0])
            for path in adapters[1:]:
                self.peft.load_adapter(path, adapter_name=path.name)
            self.peft.eval()
        let_bitsandbytes_repack(model)

    def cases(self) -> dict[str, Callable[[], tuple[int, float]]]:
        count = len(self.names)
        return {
            "transformers generate batch=1 adapters=0": lambda: self._disabled(1),
            "peft generate batch=1 adapters=1": lambda: self._generate(1, None),
            f"peft generate batch={count} adapters=1": lambda: self._generate(count, None),
            f"peft mixed adapter_names batch={count} adapters={count}": lambda: self._generate(count, self.names),
        }

    def _disabled(self, batch: int) -> tuple[int, float]:
        """The bare model as transformers runs it: PEFT's wrappers step aside, at the price of one branch a layer."""
        with self.peft.disable_adapter():
            return self._generate(batch, None)

    def _generate(self, batch: int, names: list[str] | None) -> tuple[int, float]:
        ids = (torch.arange(batch * self.prompt).view(batch, self.prompt) * 7919) % 40000 + 100
        more = {} if names is None else {"adapter_names": names}
        times = []
        for tokens in (1, 1 + self.steps):
            began = self.clock()
            with torch.inference_mode():
                self.peft.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    pad_token_id=0,
                    **more,
                )
            times.append(self.clock() - began)
        return batch * self.steps, times[1] - times[0]


def let_bitsandbytes_repack(model: Any) -> None:
    """Undo `load_base`'s refusal of bitsandbytes' own CPU layout: a user of plain transformers has its fast path."""
    from bitsandbytes.functional import has_avx512bf16

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = has_avx512bf16()
