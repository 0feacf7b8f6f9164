"""Which NF4 kernel is fastest for a shape, as measured on a GPU by bench/gpu_kernels.py. No torch here."""

Choice = str
"""A variant's name in cuda_nf4.py, or `dequantise` (then cuBLAS)."""

_H100: dict[tuple[int, int], list[tuple[int, Choice | None]]] = {
    (4096, 4096): [(8, "small16")],
    (4096, 11008): [(4, "small16")],
    (22016, 4096): [(8, "small"), (48, None), (64, "wg64_tall")],
}
"""(N, K) -> rising (largest M, choice); None: the rule of thumb is as good."""

_TABLES = {"NVIDIA H100": _H100, "NVIDIA H200": _H100}


def measured_choice(gpu: str, m: int, n: int, k: int) -> Choice | None:
    """None where nothing was measured."""
    for name, table in _TABLES.items():
        if gpu.startswith(name):
            for largest, choice in table.get((n, k), ()):
                if m <= largest:
                    return choice
    return None
