"""The base out of a server's memory: the trainer's model is built around the very weights that the server holds.

The server says in its note where they are (onebase/serving_note.py). A job then adds adapter, optimiser and
activations only. Where no server has this base on this device, the caller loads its own.
"""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from onebase.base_model import LoadedBase, check_tokenizer, offline
from onebase.bases import BaseSpec
from onebase.errors import InvalidInput
from onebase.serving_note import SeenServer, living_servers
from onebase.shared_tensors import map_file, open_cuda_handles
from onebase.tokenizer import TextTokenizer
from onebase_training.stop import ServerGone
from onebase_training.unpacking import Library, Strips, TiledRows

logger = logging.getLogger(__name__)

LOADING_S: Final = 600.0
"""How long a server may take to load its base before a training process loads its own."""
_LOOK_S: Final = 0.2

Unpack = Callable[[torch.dtype, Tensor | None], Tensor]


class Borrowed:
    """A server's base. `require_owner` before anything is trusted that was computed with it."""

    def __init__(self, server: SeenServer, description: Mapping[str, Any]) -> None:
        self.description = description
        self._server = server
        self._outlives = "file" in description

    def require_owner(self) -> None:
        """Raises ServerGone once the weights can't be trusted any more. A mapped file stays, CUDA memory does not."""
        if not self._outlives and not self._server.is_alive():
            raise ServerGone(f"the server that held the base ({self._server.path.stem}) has ended")

    def load(self, spec: BaseSpec, tokenizer: TextTokenizer, device: torch.device, dtype: torch.dtype) -> LoadedBase:
        """The model around the server's weights. Raises OSError, InvalidInput, RuntimeError, KeyError or
        AttributeError when they can't be opened."""
        check_tokenizer(spec, tokenizer)
        described = self.description
        tensors = map_file(Path(described["file"])) if "file" in described else open_cuda_handles(described["handles"])
        model = _skeleton(spec, dtype)
        _put_linears(model, described, tensors, device, dtype)
        _put_plain(model, tensors, dtype)
        model.model.rotary_emb.to(device)
        model.is_loaded_in_4bit = True
        model.name_or_path = model.config._name_or_path = spec.id
        model.requires_grad_(False)
        model.eval()
        return LoadedBase(model=model, tokenizer=tokenizer, spec=spec, compute_dtype=dtype, is_shared=True)


def find_shared(
    folder: Path,
    spec: BaseSpec,
    device: torch.device,
    *,
    on_wait: Callable[[], None] = lambda: None,
    loading_s: float = LOADING_S,
) -> Borrowed | None:
    """The base in a living server's memory; waits for servers that are loading. None: there is none to be had."""
    give_up_at = time.monotonic() + loading_s
    servers: dict[Path, SeenServer] = {}
    while True:
        servers = living_servers(folder, servers)
        # Loading is looked at first: one that becomes ready in between is asked in the next round.
        is_loading = any(not server.is_ready for server in servers.values())
        for server in servers.values():
            described = server.base() if server.is_ready else None
            if described is not None and _fits(described, spec, device):
                return Borrowed(server, described)
        if not is_loading or time.monotonic() > give_up_at:
            return None
        on_wait()
        time.sleep(_LOOK_S)


def _fits(described: Mapping[str, Any], spec: BaseSpec, device: torch.device) -> bool:
    theirs = torch.device(str(described["device"]))
    same_device = theirs.type == device.type and (theirs.index or 0) == (device.index or 0)
    known = described.get("layout") in ("strips", "strips-amx", "tiles", "tiles-folded")
    return same_device and known and described.get("base") == spec.identity.model_dump(mode="json")


class SharedLinear(Linear4bit):  # type: ignore[misc]
    """A Linear4bit whose values are unpacked out of a server's layout at each use (`dequantized` asks `unpack`)."""

    def __init__(self, like: nn.Linear, unpack: Unpack, packed: Tensor, dtype: torch.dtype) -> None:
        super().__init__(
            like.in_features,
            like.out_features,
            bias=like.bias is not None,
            compute_dtype=dtype,
            quant_type="nf4",
            device="meta",
        )
        self._values = unpack
        # Bytes that bitsandbytes can't read (there is no quant_state): whoever tries gets an error, not garbage.
        self.weight = Params4bit(packed, requires_grad=False, quant_type="nf4", bnb_quantized=True)

    def unpack(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """[out, in]: the values of the compute dtype, which the forward pass multiplies by. In `out` where given."""
        if dtype == self.compute_dtype:
            return self._values(dtype, out)
        values = self._values(self.compute_dtype, None).to(dtype)
        return values if out is None else out.copy_(values)

    def forward(self, x: Tensor) -> Tensor:
        return _FrozenLinear.apply(x, self.unpack, self.bias, self.compute_dtype)  # type: ignore[no-untyped-call, no-any-return]


class _FrozenLinear(torch.autograd.Function):
    """x W^T + bias; W is unpacked again in the backward pass rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, unpack: Unpack, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.unpack, ctx.dtype = unpack, dtype
        return nn.functional.linear(x.to(dtype), unpack(dtype, None), bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        grad_x = (rows @ ctx.unpack(ctx.dtype, None)).view(*grad.shape[:-1], -1)
        return grad_x.to(grad.dtype), None, None, None


def _skeleton(spec: BaseSpec, dtype: torch.dtype) -> Any:
    """transformers' own model without weights; its buffers (rotary frequencies) are real."""
    import transformers
    from accelerate import init_empty_weights

    with offline(), init_empty_weights(include_buffers=False):
        config = transformers.AutoConfig.from_pretrained(spec.path, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    with suppress(OSError):  # a base need not have one
        model.generation_config = transformers.GenerationConfig.from_pretrained(spec.path, local_files_only=True)
    return model


def _put_linears(
    model: Any, described: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    code = torch.tensor(described["code"], dtype=torch.float32, device=device)
    library = Library(Path(described["library"])) if "library" in described else None
    for index, layer in enumerate(model.model.layers):
        for name, modules in described["projections"].items():
            packed = tensors[f"model.layers.{index}.{name}.packed"]
            bias = tensors.get(f"model.layers.{index}.{name}.bias")
            first = 0
            for turn, path in enumerate(modules):
                like = layer.get_submodule(path)
                shape = (like.out_features, like.in_features)
                unpack: Unpack
                if library is not None:
                    unpack = Strips(library, packed, code, first, shape, described["layout"] == "strips-amx")
                else:
                    folded = name == "gate_up" and described["layout"] == "tiles-folded"
                    scale = float(described["code_scale"])
                    unpack = TiledRows(packed, code, scale, first, shape, turn if folded else None)
                linear = SharedLinear(like, unpack, packed, dtype)
                if like.bias is not None:
                    if bias is None:
                        raise InvalidInput(f"the server's {name} of layer {index} has no bias", param="base")
                    linear.bias = nn.Parameter(bias[first : first + shape[0]].to(dtype), requires_grad=False)
                layer.set_submodule(path, linear)
                first += shape[0]


def _put_plain(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Embedding, head and norms. In another dtype than the server's they are copies."""
    tied = bool(model.config.tie_word_embeddings)
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta or (tied and name == "lm_head.weight"):
            continue
        given = tensors[name]
        if given.shape != parameter.shape:
            raise InvalidInput(f"the server's {name} is {list(given.shape)}, not {list(parameter.shape)}", param="base")
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Parameter(given.to(dtype), requires_grad=False))
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
