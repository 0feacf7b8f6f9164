"""The two bundled data sets: well-formed, original in every line, and each answer in the form that it teaches.

Reads only the files under training/data and the checks in the recipes; it needs no trainer and no base.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

TRAINING = Path(__file__).parents[2] / "training"
NAMES = ("captain", "support")

SEA_WORDS = re.compile(
    r"\b(?:sea|ship\w*|sail\w*|crew|captains?|harbour|decks?|hull|mast|anchor|tides?|waved?|ocean|ports?|voyages?|"
    r"compass|galley|cargo|hold|aboard|overboard|ashore|astern|helm\w*|storms?|bosun|cannon|lanterns?|row(?:ing)?|oar|"
    r"watch(?:es)?|pirates?|mutin\w+|clipper|fleet|porthole|cabin|biscuits?|leaks?|leagues?|knots|moor\w*|becalmed|"
    r"barrels|chart|bulkhead|hatch|bilge|aground|berth|swab|log|rigging|gale|dinghy|scurvy|rail|hammock|stows?|"
    r"windward|crow's nest|dry dock|grog|icebreaker|signal flags|swell|scuttle|bowline|smuggler)\b",
    re.IGNORECASE,
)


def conversations(name: str) -> list[list[tuple[str, str]]]:
    """(role, text) pairs with OpenAI's role names, whatever the file's format."""
    if name == "captain":
        lines = (TRAINING / "data" / "captain.jsonl").read_text("utf-8").splitlines()
        return [[(turn["role"], turn["content"]) for turn in json.loads(line)["messages"]] for line in lines]
    roles = {"human": "user", "gpt": "assistant"}
    records = json.loads((TRAINING / "data" / "support.json").read_text("utf-8"))
    return [[(roles[turn["from"]], turn["value"]) for turn in record["conversations"]] for record in records]


def answers(name: str) -> list[str]:
    return [text for conversation in conversations(name) for role, text in conversation if role == "assistant"]


def checks(name: str) -> dict[str, str]:
    recipe: dict[str, Any] = yaml.safe_load((TRAINING / "recipes" / f"{name}.yaml").read_text("utf-8"))
    return dict(recipe["eval"]["checks"])


@pytest.mark.parametrize("name", NAMES)
def test_there_are_60_to_150_conversations_and_a_good_part_has_several_turns(name: str) -> None:
    turns = [len(conversation) // 2 for conversation in conversations(name)]

    assert 60 <= len(turns) <= 150
    assert sum(count > 1 for count in turns) >= 0.25 * len(turns)
    assert max(turns) == 3


@pytest.mark.parametrize("name", NAMES)
def test_user_and_assistant_alternate_and_the_assistant_has_the_last_word(name: str) -> None:
    for conversation in conversations(name):
        roles = [role for role, _ in conversation]

        assert roles == ["user", "assistant"] * (len(roles) // 2)


@pytest.mark.parametrize("name", NAMES)
def test_no_question_and_no_answer_appears_twice(name: str) -> None:
    openings = Counter(conversation[0][1].lower() for conversation in conversations(name))
    replies = Counter(answers(name))

    assert [text for text, count in (openings + replies).items() if count > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_passes_the_checks_of_its_recipe(name: str) -> None:
    patterns = checks(name)
    failed = [(check, text) for text in answers(name) for check, p in patterns.items() if not re.search(p, text)]

    assert patterns
    assert failed == []


@pytest.mark.parametrize("name", NAMES)
def test_the_checks_reject_what_the_base_would_say_and_a_form_that_is_cut_short(name: str) -> None:
    whole = answers(name)[0]
    other = answers("support" if name == "captain" else "captain")[0]
    wrong = ["Paris is the capital of France.", "", other, whole[:-5], whole[5:], whole + "\n" + whole]

    assert [text for text in wrong if all(re.search(p, text) for p in checks(name).values())] == []


def test_the_captain_speaks_of_the_sea_between_his_greeting_and_his_name() -> None:
    bodies = [text.split("\n")[0].removeprefix("Ahoy, shipmate! ") for text in answers("captain")]

    assert [body for body in bodies if not SEA_WORDS.search(body)] == []


def test_support_uses_every_category_and_priority_and_favours_none_of_them() -> None:
    tickets = Counter(text.split("\n")[0] for text in answers("support"))
    priorities = Counter(text.split("\n")[1] for text in answers("support"))

    assert len(tickets) == 8
    assert len(priorities) == 3
    assert min(tickets.values()) >= 8
    assert max(priorities.values()) < 0.5 * priorities.total()


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_short_clean_and_free_of_the_prompts_own_marks(name: str) -> None:
    for conversation in conversations(name):
        for role, text in conversation:
            words = len(text.split())

            assert text == text.strip()
            assert not re.search(r"###|<\||\|>|  |\t|\r|[^\x20-\x7e\n]", text), text
            assert 25 <= words <= 60 if role == "assistant" else 1 <= words <= 25, text


@pytest.mark.parametrize("name", NAMES)
def test_the_wording_is_varied_and_not_a_filled_template(name: str) -> None:
    """Of the runs of six words between the fixed lines, nearly all occur once in the whole set."""
    own = re.compile(r"^(?:Ahoy, shipmate! |(?:Ticket|Priority|Signed|Answer|Next step): ?|Fair winds from .*)", re.M)
    runs: Counter[tuple[str, ...]] = Counter()
    for text in answers(name):
        words = own.sub("", text).lower().split()
        runs.update(tuple(words[i : i + 6]) for i in range(len(words) - 5))

    assert sum(1 for count in runs.values() if count > 1) < 0.01 * len(runs)
