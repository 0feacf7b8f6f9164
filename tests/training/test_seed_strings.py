"""The seed's exact strings and whitespace (VicunaDataProcessor.py, OrcaDataProcessor.py), and that its rows serve."""

import pytest

from onebase.prompt import get_renderer
from onebase.tokenizer import TextTokenizer
from onebase_training.config import Headers
from onebase_training.records import Conversation, parse_record
from onebase_training.rows import Encoder, seed_text

VICUNA = Headers(user="### HUMAN:\n", response="### RESPONSE:\n")
ORCA = Headers(system="### System:\n", user="### Instruction:\n", response="### Response:\n", after_eos="\n")


def vicuna(*turns: tuple[str, str]) -> Conversation:
    record = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    parsed = parse_record(record, "sharegpt", keep_unknown_roles=True)
    assert isinstance(parsed, Conversation)
    return parsed


def test_two_vicuna_turns() -> None:
    record = vicuna(("human", "Hello"), ("gpt", "Hi"), ("human", "Bye"), ("gpt", "Bye"))

    assert seed_text(record, VICUNA, "</s>") == (
        "### HUMAN:\nHello\n\n### RESPONSE:\nHi</s>\n\n### HUMAN:\nBye\n\n### RESPONSE:\nBye</s>\n\n"
    )


def test_nothing_is_stripped_from_values() -> None:
    record = vicuna(("human", "  Hello \n"), ("gpt", " Hi "))

    assert seed_text(record, VICUNA, "</s>") == "### HUMAN:\n  Hello \n\n\n### RESPONSE:\n Hi </s>\n\n"


def test_an_unknown_speaker_gets_an_upper_case_header() -> None:
    record = vicuna(("judge", "Order"), ("gpt", "Hi"))

    assert seed_text(record, VICUNA, "</s>") == "### JUDGE:\nOrder\n\n### RESPONSE:\nHi</s>\n\n"


@pytest.mark.parametrize("system", ["Be brief.", ""])
def test_orca_has_one_newline_behind_eos_and_prints_an_empty_systems_header(system: str) -> None:
    record = parse_record({"system_prompt": system, "question": "Why?", "response": "So."}, "orca")

    assert isinstance(record, Conversation)
    assert seed_text(record, ORCA, "</s>") == (
        f"### System:\n{system}\n\n### Instruction:\nWhy?\n\n### Response:\nSo.</s>\n"
    )


def test_the_seeds_headers_give_the_very_ids_that_serving_renders(
    legacy: TextTokenizer, smollm2: TextTokenizer
) -> None:
    record = vicuna(("human", "Hello 12 </s>"), ("gpt", "Hi"), ("human", "Bye"), ("gpt", "Bye\n"))
    for tokenizer in (legacy, smollm2):
        renderer = get_renderer("human_response", tokenizer)
        seed = Encoder(tokenizer, renderer, headers=VICUNA).encode(record)
        served = Encoder(tokenizer, renderer).encode(record)

        assert seed.ids.tolist() == served.ids.tolist()
        assert seed.learnt.tolist() == served.learnt.tolist()


def test_pitfall_3_eos_typed_by_a_user_is_text_and_the_appended_one_an_id(legacy: TextTokenizer) -> None:
    record = vicuna(("human", "a </s> b"), ("gpt", "c </s> d"))

    row = Encoder(legacy, get_renderer("human_response", legacy), headers=VICUNA).encode(record)

    assert row.ids.tolist().count(legacy.eos_id) == 1
    assert row.ids.tolist().count(legacy.bos_id) == 1
