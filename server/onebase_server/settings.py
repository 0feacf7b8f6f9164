"""All settings of the server, from `ONEBASE_*` and the command line: the only module that reads the environment.

A flag wins over its variable; an empty variable is as good as none. Every error is found at once and reported in
one message.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from onebase.errors import InvalidInput
from onebase.home import Home, default_home
from onebase.train_policy import policy_of

SECRETS = ("ONEBASE_API_KEYS", "ONEBASE_ADMIN_KEY", "ONEBASE_METRICS_KEY", "ONEBASE_DATABASE")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def text(raw: str) -> str:
    return raw


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(raw: str) -> int:
        value = int(raw)
        if not low <= value <= high:
            raise ValueError(f"must be {low} to {high}")
        return value

    return parse


def seconds(raw: str) -> float:
    value = float(raw)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("must be a number of seconds, 0 or more")
    return value


def yes_or_no(raw: str) -> bool:
    if raw.lower() in ("1", "true", "yes", "on"):
        return True
    if raw.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("must be true or false")


def words(raw: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in raw.split(",") if word.strip())


def folders(raw: str) -> tuple[Path, ...]:
    return tuple(Path(word).expanduser().absolute() for word in words(raw))


def one_of(*allowed: str) -> Callable[[str], str]:
    def parse(raw: str) -> str:
        if raw not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return raw

    return parse


def device(raw: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", raw):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return raw


def train_policy(raw: str) -> str:
    policy_of(raw)
    return raw


def setting(default: Any, parse: Callable[[str], Any], about: str) -> Any:
    """A field that is read from `ONEBASE_<NAME>`, or from the flag of its name."""
    return field(default=default, metadata={"parse": parse, "about": about})


@dataclass(frozen=True, slots=True)
class Settings:
    """Resolved settings. Each field's variable is `ONEBASE_` and its name in capitals."""

    home: Home
    # Where it listens, and for whom
    host: str = setting("127.0.0.1", text, "address to listen on")
    port: int = setting(8000, integer(0, 65535), "port; 0 takes a free one")
    api_keys: tuple[str, ...] = setting((), words, "keys for inference, comma-separated")
    admin_key: str | None = setting(None, text, "key for everything")
    metrics_key: str | None = setting(None, text, "key for /metrics alone; none: an admin key, or loopback")
    allow_no_keys: bool = setting(False, yes_or_no, "listen beyond loopback without any key")
    key_rpm: int | None = setting(None, integer(1, 10**9), "requests a minute of a key that has no own limit")
    key_tpm: int | None = setting(None, integer(1, 10**12), "tokens a minute of a key that has no own limit")
    key_parallel: int | None = setting(None, integer(1, 10**6), "sequences at a time of a key without own limit")
    cors_origins: tuple[str, ...] = setting((), words, "origins whose pages may call, comma-separated; * is any")
    # What it serves, and with what
    base: str | None = setting(None, text, "base by id or path; none: the embedded one")
    device: str = setting("auto", device, "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", one_of("auto", "bfloat16", "float32"), "compute type")
    base_format: str = setting(
        "auto", one_of("auto", "human_response", "chat_template"), "prompt format of the bare base"
    )
    max_context: int | None = setting(None, integer(16, 10**7), "tokens of prompt and answer; none: the base's own")
    kv_tokens: int | None = setting(None, integer(256, 10**9), "tokens of KV cache in all; none: by free memory")
    max_sequences: int = setting(64, integer(1, 4096), "sequences in one step")
    max_step_tokens: int = setting(1024, integer(16, 10**6), "tokens in one step: decoding and prefill together")
    adapter_slots: int = setting(16, integer(1, 4096), "adapter versions on the device at a time")
    max_lora_rank: int = setting(64, integer(1, 512), "largest rank of an adapter")
    adapter_memory_mb: int = setting(2048, integer(1, 10**7), "host memory for adapter versions, in MB")
    queue_limit: int = setting(1024, integer(1, 10**6), "requests that may wait; more get 429")
    share_prefixes: bool = setting(False, yes_or_no, "let keys of different owners share cached prompts")
    # Bounds on one request
    max_body_mb: int = setting(8, integer(1, 4096), "largest request body, in MB")
    max_choices: int = setting(128, integer(1, 128), "largest n")
    max_request_s: float = setting(600.0, seconds, "seconds that one generation may take; 0: no limit")
    slow_client_s: float = setting(
        30.0, seconds, "seconds a client may take over headers and body, or nothing of its answer"
    )
    keep_alive_s: int = setting(75, integer(1, 86_400), "seconds a connection is kept between requests")
    max_connections: int = setting(4096, integer(8, 10**6), "connections at a time; more get 503")
    ping_s: float = setting(15.0, seconds, "seconds of silence before a stream's keep-alive comment")
    drain_s: float = setting(30.0, seconds, "seconds that running requests get at shutdown")
    log_level: str = setting("info", one_of("debug", "info", "warning", "error"), "logging")
    log_format: str = setting("line", one_of("line", "json"), "logs for people or for machines")
    response_memory_mb: int = setting(256, integer(1, 10**6), "memory for responses to go on from, in MB")
    metrics_versions: int = setting(50, integer(1, 10_000), "adapter versions with metrics of their own")
    otlp_endpoint: str | None = setting(None, text, "OpenTelemetry collector (http://host:4318); none: no traces")
    # What it keeps
    database: str | None = setting(None, text, "database URL (postgresql://...); none: SQLite in the home folder")
    max_file_mb: int = setting(512, integer(1, 10**6), "largest uploaded file, in MB")
    file_quota_mb: int | None = setting(None, integer(1, 10**9), "MB of uploaded files a key may keep; none: no limit")
    adapter_quota_mb: int | None = setting(
        None, integer(1, 10**9), "MB of adapters a key may have trained; none: no limit"
    )
    # Training jobs
    dataset_roots: tuple[Path, ...] = setting((), folders, "folders that /admin/retrain may read, besides datasets/")
    retrain_queue: int = setting(16, integer(1, 1000), "training jobs that may wait")
    key_jobs: int | None = setting(None, integer(1, 1000), "training jobs of one key that may wait; none: no limit")
    training_jobs: int = setting(1, integer(1, 64), "training jobs that run at a time")
    retrain_nice: int = setting(10, integer(0, 19), "niceness of the training process")
    train_policy: str = setting("serve-first", train_policy, "how training makes way for requests")
    trainer_env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The environment that training processes get: the server's own, without its keys."""

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys) or self.admin_key is not None


def load_settings(env: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Settings:
    """Merge variables and flags (`None` flags are not given). Raises InvalidInput that lists every problem."""
    flags = {name: value for name, value in (flags or {}).items() if value is not None}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for spec in fields(Settings):
        if "parse" not in spec.metadata:
            continue
        variable = f"ONEBASE_{spec.name.upper()}"
        flag = flags.pop(spec.name, None)
        raw = env.get(variable, "").strip() if flag is None else str(flag)
        where = variable if flag is None else f"--{spec.name.replace('_', '-')}"
        if flag is not None and not isinstance(flag, str | int | float):
            values[spec.name] = flag
        elif raw:
            try:
                values[spec.name] = spec.metadata["parse"](raw)
            except ValueError as error:
                problems.append(f"{where}: {_reason(error, raw, variable)}")
    home = flags.pop("home", None) or default_home(env)
    problems += [f"--{name.replace('_', '-')}: there is no such setting" for name in flags]
    values["home"] = home if isinstance(home, Home) else Home(Path(home).expanduser().absolute())
    values["trainer_env"] = {name: value for name, value in env.items() if name not in SECRETS}
    problems += _contradictions(values)
    if problems:
        raise InvalidInput("the settings can't be used: " + "; ".join(problems), param="settings")
    return Settings(**values)


def _reason(error: ValueError, raw: str, variable: str) -> str:
    shown = "its value" if variable in SECRETS else repr(raw)
    text = str(error)
    return f"{shown} {text}" if text.startswith("must") else f"{shown} is not a number"


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    def value(name: str) -> Any:
        spec = next(each for each in fields(Settings) if each.name == name)
        return values.get(name, spec.default if spec.default is not MISSING else None)

    problems = []
    if value("admin_key") is not None and value("admin_key") in value("api_keys"):
        problems.append("ONEBASE_ADMIN_KEY is also among ONEBASE_API_KEYS: everyone would be admin")
    if value("metrics_key") is not None and value("metrics_key") in (*value("api_keys"), value("admin_key")):
        problems.append("ONEBASE_METRICS_KEY is also a key for more than metrics: make one of its own")
    if any(len(key) < 8 for key in (*value("api_keys"), *filter(None, map(value, ("admin_key", "metrics_key"))))):
        problems.append("a key is shorter than 8 characters: it can be guessed")
    return problems
