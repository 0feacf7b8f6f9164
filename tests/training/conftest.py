"""What training's tests share: tokenizers (no torch), and one tiny base a session (torch)."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from onebase.home import Home
from onebase.prompt import get_renderer
from onebase.tokenizer import TextTokenizer
from onebase_training.rows import Encoder
from sample_tokenizers import sentencepiece_folder, smollm2_folder
from tiny_base import recipe, sharegpt_file

SLOW_FILE = "pytestmark = pytest.mark.slow"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A file that is slow as a whole imports torch: where slow tests are left out it is not even read."""
    left_out = "not slow" in str(config.option.markexpr)
    if left_out and collection_path.suffix == ".py" and SLOW_FILE in collection_path.read_text("utf-8").splitlines():
        return True
    return None


@pytest.fixture(scope="session")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    """OpenLLaMA's kind: bos, byte fallback, legacy space."""
    return TextTokenizer.load(sentencepiece_folder(tmp_path_factory.mktemp("legacy")))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(smollm2_folder(tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="session")
def encoder(legacy: TextTokenizer) -> Encoder:
    return Encoder(legacy, get_renderer("human_response", legacy))


@pytest.fixture(scope="session")
def base_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with the tiny base. Not to be written to: `home` is a copy for one test."""
    from tiny_base import tiny_base

    return tiny_base(tmp_path_factory.mktemp("tiny"))[0]


@pytest.fixture
def home(base_home: Home, tmp_path: Path) -> Home:
    copied = Home(tmp_path / "home")
    shutil.copytree(base_home.root, copied.root)
    return copied


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Any]:
    """A recipe of 40 steps. With dropout: its random stream must go on where it stopped."""
    settings = {"epochs": 8, "save_every": 3, "eval_every": "never"}
    return recipe(sharegpt_file(tmp_path / "data.jsonl"), train=settings, lora={"dropout": 0.1})
