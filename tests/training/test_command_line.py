"""How the training commands say that they were called wrongly."""

import gc
import sys

import pytest

from onebase_training.__main__ import main


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["recipe.yaml", "--bogus"], "No such option: --bogus (see `onebase train --help`)"),
        (["eval", "--at-least", "7", "x"], "'--at-least'"),
        (["eval"], "give a recipe or a data file (or --reports) (see `onebase eval --help`)"),
        (["export", "m", "d", "--form", "bad"], "'bad' is not one of peft, merged, gguf-lora, gguf-merged"),
        (["data", "check"], "(see `onebase data check --help`)"),
        (["data", "nope"], "No such command 'nope'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["onebase", *words])
    monkeypatch.setattr(gc, "freeze", lambda: None)  # not of the tests' process

    with pytest.raises(SystemExit) as ended:
        main()

    shown = capsys.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("error: ")
    assert said in shown.err


def test_a_command_that_ends_in_an_exit_code_of_its_own_keeps_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["onebase", "train", "/nowhere/recipe.yaml"])
    monkeypatch.setattr(gc, "freeze", lambda: None)

    with pytest.raises(SystemExit) as ended:
        main()

    assert ended.value.code == 1
    assert "can't read the recipe" in capsys.readouterr().err
