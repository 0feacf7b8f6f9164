"""`openapi.yaml`, generated from the app: `python -m onebase_server.openapi` writes it, `--check` only compares.

Paths and parameters are Litestar's reading of the handlers, schemas are pydantic's own; what neither can know (errors,
streams, security, examples) is added from the tables in `openapi_words.py`. The same app gives the same bytes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from litestar import Litestar
from litestar.openapi import OpenAPIConfig
from litestar.routes import HTTPRoute
from litestar.serialization import encode_json, get_serializer
from pydantic.json_schema import models_json_schema

from onebase import __version__
from onebase.home import Home
from onebase_server.api.schemas_common import ErrorBody, RequestPart, Wire
from onebase_server.app import create_app
from onebase_server.compose import build_deps
from onebase_server.openapi_words import ABOUT, ERRORS, EXAMPLES, REPLIES, TAGS, errors_of
from onebase_server.settings import Settings

Json = dict[str, Any]
REQUEST_ID: Json = {"x-request-id": {"description": "Ask about a request by it.", "schema": {"type": "string"}}}
REF = "#/components/schemas/{model}"


def build_document() -> Json:
    """The OpenAPI 3.1 document as plain values."""
    # no file is read or made: a home folder that is not there will do
    deps = build_deps(Settings(home=Home(Path("/nonexistent"))))
    app = create_app(deps, OpenAPIConfig(title="onebase", version=__version__, use_handler_docstrings=True))
    encoded = encode_json(app.openapi_schema.to_schema(), serializer=get_serializer(app.type_encoders))
    paths: Json = json.loads(encoded)["paths"]
    may_be_empty = optional_bodies(app)
    for path in paths:
        for method, operation in operations(paths[path]):
            complete_operation(operation, path, method)
            if operation["operationId"] in may_be_empty:
                operation["requestBody"]["required"] = False
    return {
        "openapi": "3.1.0",
        "info": {"title": "onebase", "version": __version__, "description": ABOUT, "license": {"name": "Apache-2.0"}},
        "servers": [{"url": "http://127.0.0.1:8000"}],
        "tags": [{"name": name, "description": words} for name, words in TAGS.items()],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "responses": {name: error_response(name) for name in sorted(ERRORS)},
            "schemas": schemas_of(paths),
        },
    }


def optional_bodies(app: Litestar) -> frozenset[str]:
    """Operations whose handler has a value for a body that is not there."""
    handlers = (handler for route in app.routes if isinstance(route, HTTPRoute) for handler in route.route_handlers)
    fields = ((handler, handler.parsed_fn_signature.parameters.get("data")) for handler in handlers)
    return frozenset(str(handler.operation_id) for handler, data in fields if data is not None and data.has_default)


def operations(path_item: Json) -> Iterator[tuple[str, Json]]:
    return ((method, value) for method, value in path_item.items() if isinstance(value, dict))


def complete_operation(operation: Json, path: str, method: str) -> None:
    """Errors, streams and examples of one operation."""
    name = operation["operationId"]
    operation.pop("deprecated", None)
    operation["summary"] = operation.pop("description").split("\n")[0]
    replies = operation["responses"]
    replies.pop("400", None)
    ok = replies["200"]
    ok["description"] = "OK"
    ok["headers"] = REQUEST_ID
    if name in REPLIES:
        ok["content"] = {kind: {"schema": schema} for kind, schema in REPLIES[name].items()}
    body = operation.get("requestBody")
    if body and name in EXAMPLES:
        content = body["content"]["application/json"]
        content["examples"] = {title: {"value": value} for title, value in EXAMPLES[name].items()}
    for status in errors_of(path, method, has_body=body is not None):
        replies[status] = {"$ref": f"#/components/responses/{status}"}
    if not path.startswith(("/v1", "/admin")):
        operation["security"] = [{}, {"bearer": []}] if path == "/metrics" else []


def error_response(status: str) -> Json:
    description, example = ERRORS[status]
    content = {"schema": {"$ref": REF.format(model=ErrorBody.__name__)}, "example": {"error": example}}
    headers = dict(REQUEST_ID)
    if status in ("429", "503"):
        headers["Retry-After"] = {"description": "Seconds.", "schema": {"type": "integer"}}
    return {"description": description, "headers": headers, "content": {"application/json": content}}


def schemas_of(paths: Json) -> Json:
    """Pydantic's schemas of every wire model that the paths name, and of those that these name."""
    by_name = {model.__name__: model for model in wire_models(Wire)}
    named = sorted(set(references(paths)) | {ErrorBody.__name__})
    missing = [name for name in named if name not in by_name]
    assert not missing, f"not wire models: {missing}"
    _, document = models_json_schema([(by_name[name], "validation") for name in named], ref_template=REF)
    schemas: Json = without_titles(document["$defs"])
    for name, schema in schemas.items():
        if issubclass(by_name[name], RequestPart):
            schema["additionalProperties"] = False  # decode.py refuses what it does not know
    return dict(sorted(schemas.items()))


def without_titles(value: Any) -> Any:
    """Pydantic titles every field by its own name, which says nothing."""
    if isinstance(value, dict):
        return {k: without_titles(v) for k, v in value.items() if not (k == "title" and isinstance(v, str))}
    return [without_titles(each) for each in value] if isinstance(value, list) else value


def wire_models(model: type[Wire]) -> Iterator[type[Wire]]:
    for child in model.__subclasses__():
        yield child
        yield from wire_models(child)


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value and "/schemas/" in value["$ref"]:
            yield value["$ref"].rsplit("/", 1)[1]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


class PlainDumper(yaml.SafeDumper):
    """No anchors: each example stands by itself."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def render(document: Json) -> str:
    head = "# Generated from the app by `python -m onebase_server.openapi`; don't edit.\n"
    return head + yaml.dump(document, Dumper=PlainDumper, sort_keys=False, allow_unicode=True, width=100)


def main(arguments: list[str], document: Json | None = None) -> int:
    """Write openapi.yaml in the working directory, or with `--check` say whether it is up to date."""
    target = Path("openapi.yaml")
    text = render(document or build_document())
    if "--check" not in arguments:
        target.write_text(text, encoding="utf-8")
        return 0
    if target.is_file() and target.read_text(encoding="utf-8") == text:
        return 0
    sys.stderr.write("openapi.yaml is not what the app says; write it anew: python -m onebase_server.openapi\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
