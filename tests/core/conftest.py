"""Tokenizers and renderers of the core tests, each built once a session."""

from pathlib import Path

import pytest
from hypothesis import settings

from onebase.prompt import PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer
from sample_tokenizers import sentencepiece_folder, smollm2_folder

settings.register_profile("onebase", deadline=None, max_examples=25)
settings.load_profile("onebase")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "smollm2": smollm2_folder(root / "smollm2"),
        "legacy": sentencepiece_folder(root / "legacy"),
        "metaspace": sentencepiece_folder(root / "metaspace", metaspace=True),
    }


@pytest.fixture(scope="session")
def tokenizers(folders: dict[str, Path]) -> dict[str, TextTokenizer]:
    return {name: TextTokenizer.load(folder) for name, folder in folders.items()}


@pytest.fixture(scope="session")
def smollm2(tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    return tokenizers["smollm2"]


@pytest.fixture(scope="session")
def legacy(tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    return tokenizers["legacy"]


@pytest.fixture(scope="session", params=["smollm2", "legacy", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, TextTokenizer]) -> TextTokenizer:
    return tokenizers[request.param]


@pytest.fixture(scope="session", params=["smollm2", "legacy"])
def seed_renderer(request: pytest.FixtureRequest, tokenizers: dict[str, TextTokenizer]) -> PromptRenderer:
    return get_renderer("human_response", tokenizers[request.param])


@pytest.fixture(
    scope="session",
    params=["human_response-smollm2", "human_response-legacy", "chat_template-smollm2", "chat_template-legacy"],
)
def renderer(
    request: pytest.FixtureRequest, tokenizers: dict[str, TextTokenizer], folders: dict[str, Path]
) -> PromptRenderer:
    prompt_format, name = request.param.split("-")
    template = (folders[name] / "chat_template.jinja").read_text(encoding="utf-8")
    return get_renderer(prompt_format, tokenizers[name], template)
