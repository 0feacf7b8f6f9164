"""A step's forward in one C++ call on the CPU: the same contract as `ModelForward`, against which it is tested.

Python fills plain structs with pointers once; a step then costs a handful of numpy views and one ctypes call that
releases the GIL. Pages are laid out by the C++ side (cpu/attention.h): only whole pages may be copied from outside.
"""

import ctypes

import torch
from torch import Tensor

from onebase_server.engine.lora_slots import LoraSlots
from onebase_server.engine.model_forward import KVCache
from onebase_server.engine.weights import PROJECTIONS, LayerWeights, ModelWeights
from onebase_server.kernels import cpu_abi
from onebase_server.kernels.cpu_ops import CpuKernels, Repacked
from onebase_server.kernels.ops import StepMeta


def covers(weights: ModelWeights, page_size: int) -> bool:
    """Whether the C++ forward fits these sizes (every published Llama-family model does)."""
    g = weights.geometry
    wide = all(size % 64 == 0 for size in (g.hidden, g.inner, g.heads * g.head))
    return wide and g.head % 32 == 0 and g.head <= 256 and page_size % 16 == 0


class CpuForward:
    """Callable like `ModelForward`. Weights must have been read with the same `CpuKernels`."""

    def __init__(self, weights: ModelWeights, kernels: CpuKernels, cache: KVCache, slots: LoraSlots) -> None:
        assert covers(weights, cache.page_size)
        self.weights = weights
        self.kernels = kernels
        self.slots = slots
        self._kept: list[Tensor] = []
        self._layers = (cpu_abi.Layer * weights.geometry.layers)(
            *(self._layer(i, layer, cache) for i, layer in enumerate(weights.layers))
        )
        self._model = self._describe(cache)
        self._workspace = torch.empty(0, dtype=torch.uint8)
        self._logits = torch.empty(0)

    def __call__(self, token_ids: Tensor, meta: StepMeta, active: frozenset[str], sample_tokens: Tensor) -> Tensor:
        """token_ids int32 [T]; sample_tokens int64 [R] -> logits [R, V] fp32, overwritten by the next call."""
        threads = torch.get_num_threads()
        tokens, samples = token_ids.shape[0], sample_tokens.shape[0]
        logits = self._logits_of(samples)
        workspace = self._space(max(tokens, samples), meta.max_rank, threads)
        step = cpu_abi.Step(
            tokens=token_ids.data_ptr(),
            positions=meta.positions.data_ptr(),
            seqs=meta.token_seqs.data_ptr(),
            query_starts=meta.query_starts.data_ptr(),
            context_lens=meta.context_lens.data_ptr(),
            block_tables=meta.block_tables.data_ptr(),
            lora_starts=meta.lora_starts.data_ptr(),
            lora_ranks=meta.lora_ranks.data_ptr(),
            kv_slots=meta.kv_slots.data_ptr(),
            sample_tokens=sample_tokens.data_ptr(),
            logits=logits.data_ptr(),
            workspace=workspace.data_ptr(),
            num_tokens=tokens,
            num_seqs=meta.context_lens.shape[0],
            table_width=meta.block_tables.shape[1],
            num_samples=samples,
            active=sum(1 << i for i, name in enumerate(PROJECTIONS) if name in active),
            threads=threads,
        )
        self._model.rank_table = self.slots.rank_table.ctypes.data
        self.kernels.library.onebase_forward(ctypes.byref(self._model), ctypes.byref(step))
        return logits

    def _logits_of(self, samples: int) -> Tensor:
        vocab = self.weights.geometry.vocab
        if self._logits.numel() < samples * vocab:
            self._logits = torch.zeros(samples * vocab)
        return self._logits[: samples * vocab].view(samples, vocab)

    def _space(self, tokens: int, max_rank: int, threads: int) -> Tensor:
        """One block of memory, grown to the largest step so far."""
        needed = self.kernels.library.onebase_workspace_bytes(ctypes.byref(self._model), tokens, max_rank, threads)
        if self._workspace.numel() < needed:
            self._workspace = torch.zeros(needed, dtype=torch.uint8)
        return self._workspace

    def _describe(self, cache: KVCache) -> cpu_abi.Model:
        w, g = self.weights, self.weights.geometry
        first = w.layers[0].projections["qkv"].weight
        return cpu_abi.Model(
            layers=self._layers,
            embed=self._pointer(w.embed),
            lm_head=self._pointer(w.lm_head),
            norm=self._pointer(w.norm.float()),
            cos=self._pointer(w.cos.float()),
            sin=self._pointer(w.sin.float()),
            code=self._pointer(first.code.float()),
            rank_table=self.slots.rank_table.ctypes.data,
            num_layers=g.layers,
            hidden=g.hidden,
            heads=g.heads,
            groups=g.kv_heads,
            head=g.head,
            inner=g.inner,
            vocab=g.vocab,
            page_size=cache.page_size,
            lora_rows=self.slots.rows,
            is_bf16=int(w.dtype == torch.bfloat16),
            use_amx=int(self.kernels.amx),
            tied=int(w.embed.data_ptr() == w.lm_head.data_ptr()),
            eps=g.eps,
            scale=g.scale,
        )

    def _layer(self, index: int, layer: LayerWeights, cache: KVCache) -> cpu_abi.Layer:
        described = cpu_abi.Layer(
            input_norm=self._pointer(layer.input_norm.float()),
            post_norm=self._pointer(layer.post_norm.float()),
            q_norm=None if layer.q_norm is None else self._pointer(layer.q_norm.float()),
            k_norm=None if layer.k_norm is None else self._pointer(layer.k_norm.float()),
            k_cache=self._pointer(cache.k[index]),
            v_cache=self._pointer(cache.v[index]),
        )
        module = 0
        for i, (name, modules) in enumerate(PROJECTIONS.items()):
            described.projections[i] = self._linear(index, layer, name, module)
            module += len(modules)
        return described

    def _linear(self, index: int, layer: LayerWeights, name: str, module: int) -> cpu_abi.Linear:
        projection, pool = layer.projections[name], self.slots.layer(index)[name]
        repacked = projection.weight.repacked
        assert isinstance(repacked, Repacked)
        assert repacked.amx == self.kernels.amx
        n, k = projection.weight.shape
        slices = len(projection.offsets) - 1
        return cpu_abi.Linear(
            data=self._pointer(repacked.data),
            bias=None if projection.bias is None else self._pointer(projection.bias.float()),
            lora_a=self._pointer(pool.a),
            lora_b=self._pointer(pool.b),
            n=n,
            k=k,
            slices=slices,
            module=module,
            offsets=(ctypes.c_int32 * 4)(*projection.offsets),
        )

    def _pointer(self, tensor: Tensor) -> int:
        """The address of a contiguous tensor that then lives as long as this object."""
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"
        self._kept.append(tensor)
        return tensor.data_ptr()
