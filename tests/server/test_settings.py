"""Settings: variables and flags, every problem in one message, no key in any message."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from onebase.errors import BaseModelError, InvalidInput
from onebase_server.loading import pick_device
from onebase_server.settings import Settings, load_settings
from onebase_server.sizing import choose_kv_tokens, kv_bytes_per_token, pages_for

ENV = {"ONEBASE_HOME": "/tmp/somewhere"}


def test_defaults_listen_on_loopback_without_a_key() -> None:
    settings = load_settings(ENV)
    assert (settings.host, settings.port, settings.has_keys) == ("127.0.0.1", 8000, False)
    assert settings.home.root == Path("/tmp/somewhere")


VALUES = [
    ("ONEBASE_PORT", "9000", "port", 9000),
    ("ONEBASE_API_KEYS", "sk-first-key, sk-second-key,", "api_keys", ("sk-first-key", "sk-second-key")),
    ("ONEBASE_ADMIN_KEY", "sk-admin-key", "admin_key", "sk-admin-key"),
    ("ONEBASE_METRICS_KEY", "sk-metrics-key", "metrics_key", "sk-metrics-key"),
    ("ONEBASE_DATASET_ROOTS", "/a,/b", "dataset_roots", (Path("/a"), Path("/b"))),
    ("ONEBASE_ALLOW_NO_KEYS", "yes", "allow_no_keys", True),
    ("ONEBASE_ALLOW_NO_KEYS", "0", "allow_no_keys", False),
    ("ONEBASE_DRAIN_S", "2.5", "drain_s", 2.5),
    ("ONEBASE_DTYPE", "float32", "dtype", "float32"),
    ("ONEBASE_DEVICE", "cuda:1", "device", "cuda:1"),
    ("ONEBASE_BASE", "", "base", None),
    ("ONEBASE_PORT", " ", "port", 8000),
]


@pytest.mark.parametrize(("variable", "raw", "name", "value"), VALUES)
def test_a_variable_sets_its_field_and_an_empty_one_is_none(variable: str, raw: str, name: str, value: Any) -> None:
    assert getattr(load_settings({**ENV, variable: raw}), name) == value


def test_a_flag_wins_over_its_variable() -> None:
    assert load_settings({**ENV, "ONEBASE_PORT": "9000"}, {"port": 0, "host": None}).port == 0


def test_every_problem_is_in_one_message() -> None:
    env = {
        **ENV,
        "ONEBASE_PORT": "high",
        "ONEBASE_DTYPE": "int4",
        "ONEBASE_DEVICE": "tpu",
        "ONEBASE_DRAIN_S": "-1",
        "ONEBASE_ALLOW_NO_KEYS": "?",
    }
    with pytest.raises(InvalidInput) as caught:
        load_settings(env, {"max_sequences": 0, "colour": "red"})
    for words in (
        "ONEBASE_PORT",
        "ONEBASE_DTYPE",
        "ONEBASE_DEVICE",
        "ONEBASE_DRAIN_S",
        "ONEBASE_ALLOW_NO_KEYS",
        "--max-sequences",
        "--colour",
    ):
        assert words in caught.value.message


@pytest.mark.parametrize(
    "env",
    [
        {"ONEBASE_API_KEYS": "abc123"},
        {"ONEBASE_ADMIN_KEY": "sk-a-long-key", "ONEBASE_API_KEYS": "sk-a-long-key"},
        {"ONEBASE_METRICS_KEY": "abc123"},
        {"ONEBASE_METRICS_KEY": "sk-a-long-key", "ONEBASE_ADMIN_KEY": "sk-a-long-key"},
    ],
    ids=["guessable", "the same twice", "guessable metrics", "metrics the same"],
)
def test_keys_that_protect_nothing_are_refused_and_not_shown(env: dict[str, str]) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_settings({**ENV, **env})
    assert not any(key in caught.value.message for key in env.values())


def test_training_processes_do_not_get_the_keys() -> None:
    env = {**ENV, "ONEBASE_API_KEYS": "sk-some-key", "ONEBASE_ADMIN_KEY": "sk-admin-key", "PATH": "/bin"}
    assert load_settings(env).trainer_env == {**ENV, "PATH": "/bin"}


def test_every_setting_says_what_it_is() -> None:
    for spec in fields(Settings):
        assert spec.name in ("home", "trainer_env") or spec.metadata["about"]


@pytest.mark.parametrize(
    ("wanted", "cuda", "device"),
    [("auto", 1, "cuda"), ("auto", 0, "cpu"), ("cpu", 1, "cpu"), ("cuda", 1, "cuda"), ("cuda:1", 2, "cuda:1")],
)
def test_the_device_is_picked(wanted: str, cuda: int, device: str) -> None:
    assert pick_device(wanted, cuda) == device


@pytest.mark.parametrize(
    ("wanted", "cuda", "words"),
    [
        ("cuda:1", 0, "cuda:1.* no CUDA device"),
        ("cuda:2", 2, "cuda:2.* last one .* cuda:1"),
        ("gpu", 1, "auto, cpu, cuda or cuda:N"),
        ("cuda:", 1, "cuda:N"),
        ("cuda:-1", 1, "cuda:N"),
        ("cpu:0", 1, "cuda:N"),
    ],
)
def test_a_device_that_is_not_there_is_named(wanted: str, cuda: int, words: str) -> None:
    with pytest.raises(BaseModelError, match=words):
        pick_device(wanted, cuda)


LLAMA = {"num_hidden_layers": 32, "num_attention_heads": 32, "hidden_size": 4096}
SMALL = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


def test_the_cache_takes_its_share_and_one_context_at_least() -> None:
    assert kv_bytes_per_token(LLAMA, 2) == 2 * 32 * 4096 * 2
    assert kv_bytes_per_token({**LLAMA, "num_key_value_heads": 8}, 2) == 2 * 32 * 1024 * 2
    sizes: dict[str, Any] = {"element_bytes": 2, "max_context": 4096, "max_sequences": 64}
    assert choose_kv_tokens(LLAMA, free_bytes=1 << 30, **sizes) == 4096
    assert choose_kv_tokens(SMALL, free_bytes=2 << 30, **sizes) == (2 << 30) // 4 // kv_bytes_per_token(SMALL, 2)
    assert choose_kv_tokens(SMALL, free_bytes=1 << 50, **sizes) == (1 << 30) // kv_bytes_per_token(SMALL, 2)
    assert pages_for(17) == 2
