"""Times of the NF4 kernels' variants on this GPU, one JSON line a figure; the dispatch table is made from them.

Weights rotate through several copies, so that they come from device memory and not from L2; launches are captured in a
graph; medians. `--all` also times the variants that lost. Run with PYTHONPATH=core:server:tests.
"""

import json
import sys
from collections.abc import Callable
from functools import partial

import torch

from nf4_weights import random_weight
from onebase_server.kernels.cuda_nf4 import NF4Matmul
from onebase_server.kernels.cuda_tiles import repack
from onebase_server.kernels.cuda_variants import Group, Small, Variant, Wide
from onebase_server.kernels.ops import NF4Weight

SHAPES = ((12288, 4096), (4096, 4096), (22016, 4096), (11008, 4096), (4096, 11008))
TOKENS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128)
EXTRA: dict[str, Variant] = {
    "wg8_412": Group(8, 4, 1, 2, 6),
    "wg16_412": Group(16, 4, 1, 2, 6),
    "wg16_221": Group(16, 2, 2, 1, 9),
    "wg32_412": Group(32, 4, 1, 2, 5),
    "wg32_221": Group(32, 2, 2, 1, 6),
    "wg64_412": Group(64, 4, 1, 2, 4),
    "wg64_311": Group(64, 3, 1, 1, 9),
    "wg64_221": Group(64, 2, 2, 1, 4),
    "wg96_311": Group(96, 3, 1, 1, 7),
    "wg96_211": Group(96, 2, 1, 1, 9),
    "wide32": Wide(4, 2, 4, 4, 4),
}


def say(**figures: object) -> None:
    print(json.dumps(figures), flush=True)


def graph_time(launches: list[Callable[[], object]], repeats: int = 15) -> float:
    """Median microseconds of one launch inside a captured graph."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return sorted(times)[len(times) // 2]


def main(everything: bool) -> None:
    nf4 = NF4Matmul(extra=EXTRA if everything else None)
    gpu = torch.cuda.get_device_name()
    for n, k in SHAPES:
        weights: list[NF4Weight] = []
        for _ in range(max(4, int(250e6 / (n * k / 2)))):
            weight = random_weight(n, k)
            weight.repacked = repack(weight)
            weights.append(weight)
        blocks = weights[0].repacked.blocks  # type: ignore[attr-defined]
        for m in TOKENS:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            found: dict[str, float] = {}
            for name in nf4.variants:
                if nf4.fits(name, m, blocks) and useful(nf4.variants[name], m):
                    found[name] = graph_time([partial(nf4.run, name, x, w, out) for w in weights])
            best = min(found, key=found.__getitem__)
            tbps = n * k * 0.5 / found[best] / 1e6
            rounded = {name: round(us, 2) for name, us in sorted(found.items(), key=lambda item: item[1])}
            say(gpu=gpu, what="nf4_matmul", shape=[n, k], M=m, best=best, TBps=round(tbps, 3), us=rounded)
        dense = torch.empty(n, k, device="cuda", dtype=torch.bfloat16)
        us = graph_time([partial(nf4.dequantise, w, dense) for w in weights])
        say(gpu=gpu, what="nf4_dequantise", shape=[n, k], us=round(us, 1), TBps=round(n * k * 2.5625 / us / 1e6, 3))
        del weights


def useful(variant: Variant, m: int) -> bool:
    """Not a variant for three times as many tokens."""
    if isinstance(variant, Small):
        return True
    return (variant.tokens if isinstance(variant, Group) else variant.token_tiles * 8) < 3 * max(m, 8)


if __name__ == "__main__":
    main("--all" in sys.argv)
