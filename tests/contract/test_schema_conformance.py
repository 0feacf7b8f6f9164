"""schemathesis over openapi.yaml: for every operation its examples, the edges of its schemas, and random requests, good
and bad, against the real app. No 5xx, no undocumented status, no reply off its schema, nothing bad taken for good.

Not asked: that all that the schemas allow is accepted. Rules between fields (docs/api.md) can't be written in them.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
import yaml
from hypothesis import HealthCheck, settings
from jsonschema import Draft202012Validator
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import FailureGroup
from schemathesis.core.parameters import ParameterLocation
from schemathesis.generation.hypothesis.builder import HypothesisTestConfig, HypothesisTestMode, create_test

from api_world import World, obey_masks, open_world, settled_stats
from onebase_server.openapi_words import TAGS

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
KEY = "sk-admin-key-1"
EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
WANTED = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "missing_required_header", "unsupported_method",
    "allow_header_conformance",
)  # fmt: skip

REJECTION = "negative_data_rejection"
FIELDS = {
    "model": "name", "adapter": "name", "training_file": "file_id", "dataset": "dataset", "completion_id": "chat_id",
    "previous_response_id": "response_id",
}  # fmt: skip
"""Field of a body -> which known thing it is to name."""


@dataclass
class Visitor:
    """Sends each case as it would go over the wire. Half of the paths and most names in bodies are brought to something
    that is there: by chance alone hardly a request would get beyond a 404."""

    world: World
    known: dict[str, str]
    checks: list[Any]
    statuses: dict[str, set[int]] = field(default_factory=dict)
    count: int = 0

    def visit(self, case: schemathesis.Case[Any]) -> None:
        self.count += 1
        self._aim(case)
        wire = case.as_transport_kwargs(base_url="http://127.0.0.1")
        wanted = ("method", "url", "headers", "params", "json", "data", "files", "cookies")
        prepared = requests.Request(**{name: wire[name] for name in wanted if name in wire}).prepare()
        headers = {name: latin(value) for name, value in prepared.headers.items() if name.lower() != "authorization"}
        if "Authorization" in prepared.headers:
            headers["Authorization"] = latin(f"Bearer {KEY}")
        body = prepared.body or b""
        content = body.encode() if isinstance(body, str) else body
        reply = self.world.request(str(prepared.method), str(prepared.url), content=content, headers=headers)
        reply.elapsed = timedelta(0)
        self.statuses.setdefault(case.operation.label, set()).add(reply.status_code)
        checks = [check for check in self.checks if check.__name__ != REJECTION or must_be_refused(case)]
        case.validate_response(reply, checks=checks)

    def _aim(self, case: schemathesis.Case[Any]) -> None:
        if self.count % 2 and case.method.lower() != "delete":
            for name in case.path_parameters or {}:
                case.path_parameters[name] = self.known.get(name, case.path_parameters[name])
        if self.count % 4 and isinstance(case.body, dict):
            for name in FIELDS.keys() & case.body.keys():
                if isinstance(case.body[name], str):
                    case.body[name] = self.known[FIELDS[name]]


def must_be_refused(case: schemathesis.Case[Any]) -> bool:
    """Only JSON bodies can be told wrong for sure: in a query or a form a list of none is nothing, and 1 is "1"."""
    component = case.meta.components.get(ParameterLocation.BODY) if case.meta else None
    if component is None or not component.mode.is_negative or case.media_type != "application/json":
        return False
    document: Any = case.operation.schema.raw_schema
    wanted = document["paths"][case.operation.path][case.method.lower()]["requestBody"]["content"]["application/json"]
    validator = Draft202012Validator({**wanted["schema"], "components": document["components"]})
    return not validator.is_valid(without_nulls(case.body))


def without_nulls(value: Any) -> Any:
    """A null member means its default whatever its name (docs/api.md); a schema can't say so."""
    if isinstance(value, dict):
        return {name: without_nulls(member) for name, member in value.items() if member is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def latin(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("latin-1", "replace")


@pytest.fixture(scope="module")
def visitor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visitor]:
    loop = asyncio.new_event_loop()
    root = tmp_path_factory.mktemp("conformance")
    endless = f"while kill -0 {os.getpid()}; do sleep 1; done"  # a run that goes on for as long as this process
    with open_world(root, loop, settings={"admin_key": KEY}, trainer=("sh", "-c", endless)) as world:
        world.headers = {"Authorization": f"Bearer {KEY}"}
        obey_masks(world.runner)
        for _ in range(4):  # the document's examples speak of versions 2 to 4
            world.publish("pirate")
        load_all_checks()
        yield Visitor(world, known_things(world), [CHECKS.get_one(name) for name in WANTED])
        stats = settled_stats(world)
        assert stats.is_healthy
        assert (stats.num_running, stats.num_waiting, stats.pages_held) == (0, 0, 0)
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def known_things(world: World) -> dict[str, str]:
    """Path parameter -> the id of one that is there."""
    line = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]})
    lines = "\n".join([line] * 12).encode()
    (world.home.root / "datasets").mkdir(exist_ok=True)
    (world.home.root / "datasets" / "pirate.jsonl").write_bytes(lines)
    upload = {"files": {"file": ("a.jsonl", lines)}, "data": {"purpose": "fine-tune"}}
    file_id = world.request("POST", "/v1/files", **upload).json()["id"]
    job = {"model": "tiny/base", "training_file": file_id}
    return {
        "name": "pirate",
        "model_id": "pirate",
        "dataset": "pirate.jsonl",
        "file_id": file_id,
        "chat_id": world.chat(model="pirate", store=True).json()["id"],
        "response_id": world.post("/v1/responses", {"model": "pirate", "input": "Hi"}).json()["id"],
        "job_id": world.post("/v1/fine_tuning/jobs", job).json()["id"],
        "run_id": world.post("/admin/retrain", {"adapter": "pirate", "dataset": "pirate.jsonl"}).json()["id"],
    }


@pytest.fixture(scope="module")
def schema() -> Any:
    document = yaml.load((ROOT / "openapi.yaml").read_text("utf-8"), Loader=yaml.CSafeLoader)
    return schemathesis.openapi.from_dict(document, config=SchemathesisConfig(seed=1))


@pytest.mark.parametrize("tag", TAGS)
def test_every_reply_is_as_the_document_says(visitor: Visitor, schema: Any, tag: str) -> None:
    found = [each.ok() for each in schema.get_all_operations()]
    operations = [operation for operation in found if operation.tags == [tag]]
    assert operations
    for operation in operations:
        config = HypothesisTestConfig(
            project=schema.config, modes=list(HypothesisTestMode), settings=EXAMPLES, apply_ci_profile=False
        )
        create_test(operation=operation, test_func=visitor.visit, config=config)()
        if operation.method != "delete" and not operation.path.endswith(("/pause", "/resume")):
            assert 200 in visitor.statuses[operation.label], f"no request got through to {operation.label}"


def test_every_operation_has_one_of_the_tags(schema: Any) -> None:
    assert {tag for each in schema.get_all_operations() for tag in each.ok().tags} == set(TAGS)


def test_a_reply_off_its_schema_would_be_found(visitor: Visitor, schema: Any) -> None:
    """The same check under a document that asks for a field that is not there."""
    document = json.loads(json.dumps(schema.raw_schema))
    document["components"]["schemas"]["Health"]["required"].append("mood")
    other = schemathesis.openapi.from_dict(document, config=SchemathesisConfig(seed=1))
    case = other["/healthz"]["GET"].Case()
    with pytest.raises(FailureGroup, match="mood"):
        visitor.visit(case)


def test_a_wrong_body_that_is_taken_would_be_found(schema: Any) -> None:
    """The rejection check is left out where it can't be sure; where it counts, it is there."""
    negative, refused = 0, 0

    def visit(case: schemathesis.Case[Any]) -> None:
        nonlocal negative, refused
        component = case.meta.components.get(ParameterLocation.BODY) if case.meta else None
        negative += component is not None and component.mode.is_negative
        refused += must_be_refused(case)

    operation = schema["/v1/chat/completions"]["POST"]
    config = HypothesisTestConfig(
        project=schema.config, modes=list(HypothesisTestMode), settings=EXAMPLES, apply_ci_profile=False
    )
    create_test(operation=operation, test_func=visit, config=config)()
    assert 0 < negative // 2 < refused <= negative
