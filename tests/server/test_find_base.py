"""Which base a server takes, and what it says when there is none."""

from pathlib import Path

import pytest

from onebase.base_fetch import is_hub_id
from onebase.errors import BaseModelError
from onebase.home import Home
from onebase_server.loading import find_base, load_backend
from onebase_server.settings import load_settings


def settings(home: Path, base: str):  # type: ignore[no-untyped-def]
    return load_settings({}, {"home": Home(home), "base": base})


def test_a_name_that_is_no_base_and_no_hub_id_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as refused:
        find_base(settings(tmp_path, "smollm"))
    assert "no base 'smollm'" in refused.value.message
    assert "onebase base ls" in refused.value.message


def test_a_folder_that_is_not_a_base_is_refused_by_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"config\.json is missing"):
        find_base(settings(tmp_path, str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("openlm-research/open_llama_7b", True),
        ("smollm", False),
        ("/models/llama", False),
        ("./llama", False),
        ("a/b/c", False),
        ("llama/", False),
    ],
)
def test_a_hub_id_is_an_organisation_and_a_model(name: str, is_one: bool) -> None:
    assert is_hub_id(name) is is_one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wanted", "words"), [("cuda:1", "no base 'smollm'"), ("cuda:2", "device cuda:2: the last one of this machine is")]
)
def test_a_device_that_is_not_there_is_refused_before_a_base_is_looked_for_and_a_second_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, words: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    given = load_settings({"ONEBASE_DEVICE": wanted}, {"home": Home(tmp_path).create(), "base": "smollm"})
    with pytest.raises(BaseModelError, match=words):
        load_backend(given)
