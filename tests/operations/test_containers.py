"""The container files against what they run: no engine is at hand, so every name in them is held to the program."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.main import get_command

from onebase.home import Home
from onebase_server.api.metrics import Metrics
from onebase_server.api.metrics_sources import (
    engine_metrics,
    job_metrics,
    ready_metric,
    residency_metrics,
    tasks_metric,
)
from onebase_server.cli.main import app as cli
from onebase_server.compose import build_app
from onebase_server.engine.stats import Counters, EngineStats
from onebase_server.records.overview import Overview
from onebase_server.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docs" / "monitoring"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
SERVERS = ("server", "server-gpu")
VARIABLES = {f"ONEBASE_{each.name.upper()}" for each in fields(Settings) if "parse" in each.metadata} | {"ONEBASE_HOME"}
NOT_THE_SERVERS = {"ONEBASE_BIND", "ONEBASE_PORT"}  # of the host's side of the port


def env_example() -> dict[str, str]:
    lines = (ROOT / ".env.example").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def interpolations() -> dict[str, str | None]:
    """Variable -> its default, of every `${...}` in the compose file."""
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    found = re.findall(r"\$\{(\w+)(?::([-?])([^}]*))?\}", text)
    return {name: default if kind == "-" else None for name, kind, default in found}


def dockerfile_env() -> dict[str, str]:
    block = re.search(r"^ENV ((?:.*\\\n)*.*ONEBASE_(?:.*\\\n)*.*)$", DOCKERFILE, re.MULTILINE)
    assert block is not None
    return dict(word.split("=", 1) for word in shlex.split(block[1].replace("\\\n", " ")))


def test_the_compose_file_is_valid_by_the_compose_specifications_schema() -> None:
    schema = json.loads((Path(__file__).parent / "data" / "compose_spec.json").read_text("utf-8"))
    # `required` came with Compose 2.20, after this schema
    dependencies = schema["definitions"]["service"]["properties"]["depends_on"]["oneOf"][1]["patternProperties"]
    [dependency] = dependencies.values()
    dependency["properties"]["required"] = {"type": "boolean"}
    validator = jsonschema.Draft7Validator(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []


@pytest.mark.skipif(shutil.which("hadolint", path=str(Path(sys.executable).parent)) is None, reason="not installed")
def test_the_dockerfile_passes_hadolint() -> None:
    tool = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([tool, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_every_variable_of_the_server_in_the_files_is_a_setting() -> None:
    used = set(dockerfile_env()) | {name for each in SERVERS for name in COMPOSE["services"][each]["environment"]}
    assert {name for name in used if name.startswith("ONEBASE_")} - VARIABLES == set()
    assert {name for name in env_example() if name.startswith("ONEBASE_")} - VARIABLES - NOT_THE_SERVERS == set()


def test_every_variable_of_the_compose_file_is_in_the_example_and_the_other_way_round() -> None:
    example = env_example()
    assert set(interpolations()) == set(example) - {"COMPOSE_PROFILES"}
    for name, default in interpolations().items():
        assert not default or example[name] == default, f"{name}: the example and the default differ"


def test_the_images_environment_and_the_examples_make_settings_that_hold(tmp_path: Path) -> None:
    given = env_example()
    env = {name: value for name, value in dockerfile_env().items() if name.startswith("ONEBASE_")}
    for name, value in COMPOSE["services"]["server"]["environment"].items():
        env[name] = re.sub(r"\$\{(\w+)[^}]*\}", lambda match: given[match[1]], str(value))
    settings = load_settings({**env, "ONEBASE_ADMIN_KEY": "a-key-that-was-made-up"})
    assert (settings.host, settings.port, settings.home.root) == ("0.0.0.0", 8000, Path("/data"))
    assert settings.has_keys


def test_no_secret_has_a_default_and_the_server_demands_one() -> None:
    secret = re.compile(r"KEY|PASSWORD|DATABASE")
    defaults = {n: d for n, d in interpolations().items() if secret.search(n) and not n.startswith("ONEBASE_KEY_")}
    assert "ONEBASE_ADMIN_KEY" in defaults
    assert [name for name, default in defaults.items() if default] == []
    assert "${ONEBASE_ADMIN_KEY:?" in (ROOT / "docker-compose.yml").read_text("utf-8")


def test_ports_paths_and_probes_agree() -> None:
    env = dockerfile_env()
    port = env["ONEBASE_PORT"]
    paths = {route.path for route in build_app(Settings(home=Home(Path("/nowhere")))).routes}
    probe = re.search(r"'http://127\.0\.0\.1:' \+ os\.environ\['(\w+)'\] \+ '(/\w+)'", DOCKERFILE)
    assert probe is not None
    assert (probe[1], probe[2] in paths) == ("ONEBASE_PORT", True)
    assert f"EXPOSE {port}\n" in DOCKERFILE
    assert f"VOLUME {env['ONEBASE_HOME']}\n" in DOCKERFILE
    for name in SERVERS:
        service = COMPOSE["services"][name]
        assert service["ports"][0].endswith(f":{port}")
        assert service["volumes"] == [f"home:{env['ONEBASE_HOME']}"]
    [scrape] = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    alias = COMPOSE["services"]["server"]["networks"]["default"]["aliases"][0]
    assert scrape["metrics_path"] in paths
    assert scrape["static_configs"][0]["targets"] == [f"{alias}:{port}"]


def test_all_that_the_server_writes_is_a_volume_or_a_tmpfs() -> None:
    for name in SERVERS:
        service = COMPOSE["services"][name]
        assert service["read_only"] is True
        assert service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
    caches = {name: value for name, value in dockerfile_env().items() if "CACHE" in name or name == "HF_HOME"}
    assert caches
    assert all(value.startswith(dockerfile_env()["ONEBASE_HOME"] + "/") for value in caches.values())
    assert re.search(r"^USER 10001:10001$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("is_ready", [True, False])
def test_the_health_check_says_whether_the_server_is_ready(is_ready: bool) -> None:
    check = re.search(r"^HEALTHCHECK .*\\\n  CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert check is not None
    _, *arguments = json.loads(check[1])

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if is_ready and self.path == "/readyz" else 503)
            self.end_headers()

    with HTTPServer(("127.0.0.1", 0), Ready) as http:
        threading.Thread(target=http.handle_request).start()
        env = {**os.environ, "ONEBASE_PORT": str(http.server_port)}
        done = subprocess.run([sys.executable, *arguments], env=env, stderr=subprocess.DEVNULL, check=False)
    assert (done.returncode == 0) == is_ready


def test_a_server_waits_for_the_database_of_its_profile_and_never_pulls_another_image() -> None:
    for name in SERVERS:
        service = COMPOSE["services"][name]
        assert service["depends_on"] == {"postgres": {"condition": "service_healthy", "required": False}}
        assert service["pull_policy"] == "build"
    assert COMPOSE["services"]["postgres"]["healthcheck"]["test"][0] == "CMD-SHELL"


@pytest.mark.parametrize("password", ["", "x"])
def test_grafana_does_not_start_without_a_password(password: str) -> None:
    shell, flag, script = COMPOSE["services"]["grafana"]["entrypoint"]
    script = script.replace("$$", "$").replace("/run.sh", "echo started")
    env = {"GF_SECURITY_ADMIN_PASSWORD": password}
    done = subprocess.run(
        [shell, flag, script.replace("exec ", "")], env=env, capture_output=True, check=False, text=True
    )
    assert done.stdout == ("started\n" if password else "")
    assert (done.returncode == 0) == bool(password)
    assert "GRAFANA_PASSWORD" in done.stderr or password


@pytest.mark.parametrize("key", ["", "sk-metrics"])
def test_prometheus_scrapes_with_the_key_and_does_not_start_without_one(tmp_path: Path, key: str) -> None:
    service = COMPOSE["services"]["prometheus"]
    shell, flag, script, *name = service["entrypoint"]
    told = script.replace("$$", "$").replace("/bin/prometheus", "echo").replace("exec ", "")
    [scrape] = yaml.safe_load((MONITORING / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    path = scrape["authorization"]["credentials_file"]
    assert path in script
    assert service["tmpfs"] == [str(Path(path).parent)]
    command = [shell, flag, told.replace(path, str(tmp_path / "key")), *name, *service["command"]]
    done = subprocess.run(command, env={"METRICS_KEY": key}, capture_output=True, check=False, text=True)
    assert (done.returncode == 0) == bool(key)
    assert done.stdout == (" ".join(service["command"]) + "\n" if key else "")
    if not key:
        assert "ONEBASE_METRICS_KEY" in done.stderr
    else:
        assert (tmp_path / "key").read_text() == key
        assert (tmp_path / "key").stat().st_mode & 0o077 == 0


def test_the_drain_fits_into_the_grace_that_containers_get() -> None:
    longest = Settings(home=Home(Path("/nowhere"))).drain_s + 10 + 5  # the engine's end, and uvicorn's own
    for name in SERVERS:
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) >= longest


def test_every_command_in_the_files_is_one_of_the_command_line() -> None:
    commands = set(get_command(cli).commands)  # type: ignore[attr-defined]
    run = re.search(r'^CMD \["(\w+)"\]$', DOCKERFILE, re.MULTILINE)
    assert run is not None
    comments = (ROOT / ".env.example").read_text("utf-8")
    named = re.findall(r"(?:exec server onebase|run --rm server) (\w+)", comments)
    assert {run[1], *named} <= commands
    assert len(named) >= 2


def test_what_is_copied_into_the_image_is_there_and_not_ignored() -> None:
    copied = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]
    ]
    kept = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert copied
    for path in copied:
        assert (ROOT / path).exists()
        assert f"!{path}" in kept
    mounted = re.findall(r"\./(docs/\S+?):", (ROOT / "docker-compose.yml").read_text("utf-8"))
    assert mounted
    assert [path for path in mounted if not (ROOT / path).is_file()] == []


def all_metric_names() -> set[str]:
    """Every series that /metrics can have."""
    counters = Counters()
    given: dict[str, Any] = {each.name: getattr(counters, each.name, 0) for each in fields(EngineStats)}
    stats = EngineStats(**given)
    metrics = Metrics()
    families = [ready_metric(True), tasks_metric(1), *engine_metrics(stats), *residency_metrics([], metrics)]
    families += [*job_metrics(Overview({}, [], 0), ["running"]), *metrics.registry.collect()]
    endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
    return {family.name + ending for family in families for ending in endings[family.type]}


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"\bonebase_[a-z_]+\b", text))


def test_the_dashboard_is_as_its_rows_say_and_names_only_metrics_that_there_are() -> None:
    spec = importlib.util.spec_from_file_location("make_dashboard", MONITORING / "make_dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (MONITORING / "dashboard.json").read_text("utf-8")
    assert text == module.text(), "run: python docs/monitoring/make_dashboard.py"
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", [])]
    assert metrics_in(" ".join(queries)) - all_metric_names() == set()
    source = yaml.safe_load((MONITORING / "grafana-datasource.yml").read_text("utf-8"))["datasources"][0]
    assert f'"uid": "{source["uid"]}"' in text


def test_alerts_name_only_metrics_that_there_are_and_say_what_to_look_at() -> None:
    [group] = yaml.safe_load((MONITORING / "alerts.yml").read_text("utf-8"))["groups"]
    assert metrics_in(" ".join(rule["expr"] for rule in group["rules"])) - all_metric_names() == set()
    for rule in group["rules"]:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "look"} <= set(rule["annotations"])
        settings = set(re.findall(r"ONEBASE_[A-Z_]+", rule["annotations"]["look"]))
        assert settings - VARIABLES == set()


def test_the_example_is_not_a_secret_that_was_committed() -> None:
    assert {name: value for name, value in env_example().items() if "KEY" in name or "PASSWORD" in name if value} == {}
    assert not os.path.exists(ROOT / ".env") or "/.env" in (ROOT / ".gitignore").read_text("utf-8")
