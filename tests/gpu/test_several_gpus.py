"""Training on two real GPUs as docs/training.md says to start it, against one. Skipped where there are fewer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onebase.store import AdapterStore
from ports import held_port
from tiny_base import recipe, sharegpt_file, tiny_base, write_recipe
from training_runs import start, weights

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_pitfall_21_two_gpus_train_what_one_trains(tmp_path: Path) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    home, _ = tiny_base(tmp_path, hidden=256, layers=3)
    content = recipe(sharegpt_file(tmp_path / "data.jsonl"), compute={"dtype": "float32", "device": "cuda"})
    file = write_recipe(tmp_path / "recipe.yaml", content)
    alone = start(home, file, tmp_path / "alone", CUDA_VISIBLE_DEVICES="0")
    said = alone.communicate()
    assert alone.returncode == 0, said

    with held_port() as held:
        launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        launch += ["--main_process_port", str(held.getsockname()[1]), "-m", "onebase_training", str(file)]
        launch += ["--home", str(home.root), "--run-dir", str(tmp_path / "both")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        both = subprocess.run([sys.executable, "-m", *launch], env=env, capture_output=True, text=True)
    assert both.returncode == 0, both.stderr
    one, two = weights(tmp_path / "alone"), weights(tmp_path / "both")
    assert any(abs(one[name]).max() > 1e-3 for name in one if "lora_B" in name), "nothing was learned"
    assert all(abs(two[name] - one[name]).max() < 2e-3 * abs(one[name]).max() for name in one)
    store = AdapterStore(home.adapters)
    first, second = (store.resolve(f"tiny@{version}").metrics["trained_tokens"] for version in (1, 2))
    assert first == second
