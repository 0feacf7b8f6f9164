"""LoftQ's start for one layer: the block Krylov search against the full decomposition, time and error held.

    python bench/loftq.py [--out 4096] [--in 4096] [--rank 16] [--threads 1] [--results bench/results/loftq.jsonl]

The matrix is Gaussian noise, whose spectrum is the flattest and so the hardest; what NF4 rounds away is much like it.
CPU seconds, since other processes may share the cores.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch

from onebase_training.loftq import best_low_rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=int, default=4096)
    parser.add_argument("--in", dest="into", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    matrix = torch.randn(given.out, given.into, generator=torch.Generator().manual_seed(0))

    started = time.process_time()
    a, b = best_low_rank(matrix, given.rank)
    searched = time.process_time() - started
    started = time.process_time()
    s = torch.linalg.svd(matrix, full_matrices=False).S[: given.rank]
    decomposed = time.process_time() - started

    result = {
        "shape": [given.out, given.into],
        "rank": given.rank,
        "threads": given.threads,
        "search_cpu_s": round(searched, 2),
        "full_svd_cpu_s": round(decomposed, 2),
        "share_of_the_best": round(float(torch.linalg.norm(b @ a).square() / s.square().sum()), 4),
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }
    print(json.dumps(result))
    if given.results is not None:
        with given.results.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
