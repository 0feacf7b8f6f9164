"""openapi.yaml is what the app does: generated, compared, and complete."""

from pathlib import Path
from typing import Any

import pytest

from onebase_server.api.schemas_common import ErrorBody
from onebase_server.openapi import build_document, main, operations, references, render

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return build_document()


def all_operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, op) for path, item in document["paths"].items() for method, op in operations(item)]


def test_openapi_yaml_is_up_to_date(document: dict[str, Any]) -> None:
    assert (ROOT / "openapi.yaml").read_text("utf-8") == render(document), "run: python -m onebase_server.openapi"


def test_two_runs_give_the_same_document(document: dict[str, Any]) -> None:
    assert build_document() == document


def test_the_check_fails_on_drift(document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["--check"], document) == 1
    assert main([], document) == 0
    assert main(["--check"], document) == 0
    (tmp_path / "openapi.yaml").write_text("openapi: 3.1.0\n")
    assert main(["--check"], document) == 1


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    assert set(references(document)) == set(document["components"]["schemas"])


def test_operation_ids_are_unique_and_every_operation_says_what_it_does(document: dict[str, Any]) -> None:
    found = [op["operationId"] for _, _, op in all_operations(document)]
    assert len(found) == len(set(found))
    for path, method, op in all_operations(document):
        assert op["summary"], (method, path)
        assert op["tags"], (method, path)
        assert op["responses"]["200"]["description"], (method, path)


def test_success_is_always_200(document: dict[str, Any]) -> None:
    for path, method, op in all_operations(document):
        assert [status for status in op["responses"] if status < "400"] == ["200"], (method, path)
        assert "422" not in op["responses"]


def test_everything_behind_a_key_says_401_and_the_rest_needs_none(document: dict[str, Any]) -> None:
    for path, _, op in all_operations(document):
        behind = path.startswith(("/v1", "/admin", "/metrics"))
        assert ("401" in op["responses"]) is behind, path
        assert ("security" in op) is (not behind or path == "/metrics"), path


def test_every_error_that_an_operation_can_give_is_documented(document: dict[str, Any]) -> None:
    for path, method, op in all_operations(document):
        if not path.startswith(("/v1", "/admin")):
            continue
        wanted = {"400", "401", "403", "500", "503"}
        if "{" in path:
            wanted.add("404")
        if "requestBody" in op:
            wanted |= {"404", "408", "413", "415", "429"}
        if method == "delete" or (path.startswith("/admin/adapters/") and method == "post"):
            wanted |= {"409", "429"}
        if method == "post":
            wanted.add("429")
        assert wanted <= set(op["responses"]), (method, path)


def test_every_error_has_openais_body_a_request_id_and_an_example_of_its_schema(document: dict[str, Any]) -> None:
    for status, error in document["components"]["responses"].items():
        assert "x-request-id" in error["headers"], status
        content = error["content"]["application/json"]
        assert content["schema"]["$ref"].endswith("/ErrorBody")
        ErrorBody.model_validate(content["example"])
    for status in ("429", "503"):
        assert "Retry-After" in document["components"]["responses"][status]["headers"]


def test_streams_are_described(document: dict[str, Any]) -> None:
    content = document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]
    assert set(content) == {"application/json", "text/event-stream"}
