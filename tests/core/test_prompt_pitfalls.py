"""What users of other trainers hit, one test each: the numbers are those of docs/prompt.md's table of pitfalls."""

import json
from pathlib import Path

import pytest
from hypothesis import given

from hostile_text import conversations
from onebase.messages import Message
from onebase.prompt import PromptRenderer, get_renderer
from onebase.tokenizer import TextTokenizer
from sample_tokenizers import sentencepiece_folder

CHAT = [
    Message("user", "Hello"),
    Message("assistant", "Hi"),
    Message("user", "Bye"),
    Message("assistant", "Bye"),
]


def learnt_ids(renderer: PromptRenderer, messages: list[Message]) -> list[int]:
    example = renderer.render_example(messages)
    return [i for i, learnt in zip(example.ids, example.mask, strict=True) if learnt]


def test_pitfall_1_eos_is_learnt_even_if_the_files_say_that_pad_is_eos(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path)
    names = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = TextTokenizer.load(folder)
    assert tokenizer.pad_id != tokenizer.eos_id
    assert learnt_ids(get_renderer("human_response", tokenizer), CHAT).count(tokenizer.eos_id) == 2


def test_pitfall_2_the_last_learnt_id_is_the_eos_id(renderer: PromptRenderer) -> None:
    assert learnt_ids(renderer, CHAT)[-1] == renderer.tokenizer.eos_id


@pytest.mark.parametrize("text", ["</s>", "<s>", "[PAD]", "<unk>", "<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_pitfall_3_control_tokens_that_a_user_types_are_text(seed_renderer: PromptRenderer, text: str) -> None:
    typed = [Message("user", f"a {text}{text} b"), Message("assistant", f"c {text}")]
    plain = [Message("user", "a"), Message("assistant", "c")]
    specials = [
        [i for i in seed_renderer.render_example(messages).ids if seed_renderer.tokenizer.is_special(i)]
        for messages in (typed, plain)
    ]
    assert specials[0] == specials[1]


@given(messages=conversations)
def test_pitfall_4_no_id_is_outside_the_embedding(renderer: PromptRenderer, messages: list[Message]) -> None:
    ids = renderer.render_example(messages).ids
    assert not ids or 0 <= min(ids) <= max(ids) < renderer.tokenizer.vocab_size
    assert 0 <= renderer.tokenizer.pad_id < renderer.tokenizer.vocab_size


def test_pitfall_5_training_and_serving_share_one_bos(legacy: TextTokenizer) -> None:
    renderer = get_renderer("human_response", legacy)
    example, prompt = renderer.render_example(CHAT), renderer.render_prompt(CHAT[:3])
    assert example.ids[: len(prompt)] == prompt
    assert prompt.count(1) == example.ids.count(1) == 1


def test_pitfall_6_border_tokens_are_golden(smollm2: TextTokenizer, legacy: TextTokenizer) -> None:
    header, response = [3757, 407, 8292, 2810, 42, 198], [3757, 22405, 41442, 6493, 42, 198]
    assert get_renderer("human_response", smollm2).render_example(CHAT).ids == [
        *header, 19556, 1116, *response, 26843, 2, 1116, *header, 3087, 85, 1116, *response, 3087, 85, 2, 1116,
    ]  # fmt: skip
    pieces = [legacy.token_text(i) for i in get_renderer("human_response", legacy).render_example(CHAT[:2]).ids]
    assert pieces[:3] == ["<s>", "▁###", "▁HUMAN"]
    assert pieces[-5:] == ["H", "i", "</s>", "<0x0A>", "<0x0A>"]


def test_pitfall_7_the_mask_covers_the_responses_and_nothing_else(renderer: PromptRenderer) -> None:
    header = "### RESPONSE:\n"
    messages = [
        Message("user", f"{header}Hi"),
        Message("assistant", f"Hi{header}"),
        Message("user", ""),
        Message("assistant", ""),
        Message("user", "x"),
        Message("assistant", "not learnt", weight=0),
    ]
    eos = renderer.tokenizer.eos_id
    text = "".join("<end>" if i == eos else renderer.tokenizer.decode([i]) for i in learnt_ids(renderer, messages))
    assert text == f"Hi{header}<end><end>"
