"""The OpenAPI document is whole, of vLLM's routes too, and says what the front door answers."""

import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from starlette.routing import BaseRoute
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from rora_serve.api.allowed import MODEL_ROUTES, OPEN_ROUTES, Kind, kind_of
from rora_serve.api.model_request import NOT_FOR_CLIENTS
from rora_serve.api.openapi import openapi_document
from rora_serve.side_process import SideProcess
from tests.rora_serve.adapter_server import make_place

Document = dict[str, Any]
ERROR = {"$ref": "#/components/schemas/ErrorBody"}


@pytest.fixture(scope="module")
def vllms_routes() -> Sequence[BaseRoute]:
    """Those of vLLM's own app, which needs no engine as long as nobody asks it."""
    parser = make_arg_parser(FlexibleArgumentParser())
    level = logging.root.level
    try:
        return build_app(parser.parse_args([]), ("generate",)).routes
    finally:
        logging.root.setLevel(level)  # a package of vLLM's silences everybody below errors


@pytest.fixture(scope="module")
def document(
    tmp_path_factory: pytest.TempPathFactory,
    side_process: SideProcess,
    vllms_routes: Sequence[BaseRoute],
) -> Document:
    place = make_place(tmp_path_factory.mktemp("place"), side_process)
    return openapi_document([*place.server.routes, *vllms_routes])


def operations(document: Document) -> Iterator[tuple[str, str, Any]]:
    for path, found in document["paths"].items():
        for method, operation in found.items():
            yield method.upper(), path, operation


def test_what_is_described_is_what_the_front_door_lets_in(document: Document) -> None:
    described = {(method, path) for method, path, _ in operations(document)}
    assert all(kind_of(*each) is not Kind.UNKNOWN for each in described)
    assert described >= {("POST", path) for path in MODEL_ROUTES}
    assert described >= {("GET", path) for path in ("/health", "/ready", "/version", "/v1/models")}
    # Of two routes for one path it is ours that answers.
    models = document["paths"]["/v1/models"]["get"]["responses"]["200"]["content"]
    assert models["application/json"]["schema"]["$ref"].endswith("/ModelList")


def test_all_that_it_refers_to_is_there(document: Document) -> None:
    referred = set(re.findall(r"'\$ref': '(#[^']*)'", str(document)))
    assert len(referred) > 50
    for reference in referred:
        found: Any = document
        for key in reference.removeprefix("#/").split("/"):
            found = found[key]
    assert "HTTPValidationError" not in str(document)


def test_a_key_may_be_asked_for_everywhere_but_where_the_server_is_watched(
    document: Document,
) -> None:
    (scheme,) = document["components"]["securitySchemes"]
    assert document["components"]["securitySchemes"][scheme]["scheme"] == "bearer"
    for method, path, operation in operations(document):
        is_open = kind_of(method, path) is Kind.OPEN
        assert operation["security"] == ([] if is_open else [{scheme: []}, {}])
        assert ("401" in operation["responses"]) is not is_open
        if not is_open:
            refusal = operation["responses"]["401"]
            assert refusal["headers"]["www-authenticate"]["required"]
            assert refusal["content"]["application/json"]["schema"] == ERROR


@pytest.mark.parametrize("path", sorted(MODEL_ROUTES))
def test_requests_to_models_declare_what_the_front_door_answers(
    document: Document, path: str
) -> None:
    operation = document["paths"][path]["post"]
    responses = operation["responses"]
    assert {"200", "400", "401", "404", "413", "422", "429", "500", "504"} <= set(responses)
    assert responses["429"]["headers"]["retry-after"]["schema"] == {"type": "integer"}
    assert responses["429"]["content"]["application/json"]["schema"] == ERROR
    # vLLM's own body of an error beside ours.
    (ours, vllms) = responses["404"]["content"]["application/json"]["schema"]["anyOf"]
    assert ours == ERROR
    assert vllms["$ref"].endswith("/ErrorResponse")
    assert {"x-rora-adapter", "x-rora-tier", "x-rora-load-ms", "x-request-id"} <= set(
        responses["200"]["headers"]
    )
    parameters = {parameter["name"] for parameter in operation["parameters"]}
    assert "x-rora-deadline-ms" in parameters


def test_what_clients_may_not_say_is_not_described(document: Document) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"):
        properties = set(schemas[name]["properties"])
        assert {"model", "temperature"} <= properties
        assert not properties & set(NOT_FOR_CLIENTS)
        assert "model" in schemas[name]["required"], "vLLM would do without"
        assert schemas[name]["properties"]["model"]["minLength"] == 1


def test_errors_are_json_whatever_a_success_is(document: Document) -> None:
    for _, path, operation in operations(document):
        for status, response in operation["responses"].items():
            if int(status) >= 400 and path not in OPEN_ROUTES:
                assert set(response["content"]) == {"application/json"}, (path, status)
