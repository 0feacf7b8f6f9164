"""ctypes mirrors of the structs in cpu/model.h, and the signatures of the exported functions. Nothing else."""

import ctypes
from ctypes import POINTER, Structure, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any


class Linear(Structure):
    _fields_ = (
        ("data", c_void_p),
        ("bias", c_void_p),
        ("lora_a", c_void_p),
        ("lora_b", c_void_p),
        ("n", c_int32),
        ("k", c_int32),
        ("slices", c_int32),
        ("module", c_int32),
        ("offsets", c_int32 * 4),
    )


class Layer(Structure):
    _fields_ = (
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("k_cache", c_void_p),
        ("v_cache", c_void_p),
        ("projections", Linear * 4),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        *((name, c_void_p) for name in ("embed", "lm_head", "norm", "cos", "sin", "code", "rank_table")),
        *(
            (name, c_int32)
            for name in (
                "num_layers",
                "hidden",
                "heads",
                "groups",
                "head",
                "inner",
                "vocab",
                "page_size",
                "lora_rows",
                "is_bf16",
                "use_amx",
                "tied",
            )
        ),
        ("eps", c_float),
        ("scale", c_float),
    )


class Step(Structure):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in (
                "tokens",
                "positions",
                "seqs",
                "query_starts",
                "context_lens",
                "block_tables",
                "lora_starts",
                "lora_ranks",
                "kv_slots",
                "sample_tokens",
                "logits",
                "workspace",
            )
        ),
        *((name, c_int32) for name in ("num_tokens", "num_seqs", "table_width", "num_samples", "active", "threads")),
    )


class Draw(Structure):
    _fields_ = (
        ("uniform", c_double),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("greedy", c_int32),
    )


MODULES = 8
"""Columns of the rank table: q k v o gate up down, one spare."""


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Set argument types, and check that the structs have the sizes that the library was compiled with."""
    sizes = (c_int32 * 5)()
    library.onebase_sizes.argtypes = [c_void_p]
    library.onebase_sizes(ctypes.byref(sizes))
    mirrored = [ctypes.sizeof(struct) for struct in (Linear, Layer, Model, Step, Draw)]
    assert list(sizes) == mirrored, f"cpu_abi.py and cpu/model.h differ: {mirrored} and {list(sizes)}"
    signatures: dict[str, tuple[list[Any], Any]] = {
        "onebase_enable_amx": ([], c_int),
        "onebase_workspace_bytes": ([c_void_p, c_int, c_int, c_int], c_int64),
        "onebase_forward": ([c_void_p, c_void_p], None),
        "onebase_sample": ([c_void_p, c_int, c_int, c_void_p, c_int, c_void_p], None),
        "onebase_nf4_matmul": (
            [c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_void_p, c_void_p],
            None,
        ),
    }
    for name, (arguments, result) in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, result
    return library
