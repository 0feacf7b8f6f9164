"""Which base a server takes, and what it says when there is none."""

from pathlib import Path

import pytest

from onebase.base_fetch import is_hub_id
from onebase.errors import BaseModelError
from onebase.home import Home
from onebase_server.loading import find_base
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
