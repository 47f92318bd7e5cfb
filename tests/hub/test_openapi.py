"""Every path, given what its schema allows and what it does not: it answers as the schema says, and never breaks."""

import json
import re

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

from onthefly.control.commands import COMMANDS

# They start children that load torch, stop the training that other tests use, or are streams.
LEFT_OUT = r"/(verify|fsck|compare|scan|commands/(stop|resetSession|switchRun))$"


@pytest.fixture(scope="module")
def document(hub):
    return hub.http.get("/api/v1/openapi.json").json()


@pytest.fixture(scope="module")
def operations(hub, document):
    """Every operation that is tried; with the one store that there is, instead of names that are none."""
    meant = json.loads(json.dumps(document))
    for paths in meant["paths"].values():
        for operation in paths.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "store":
                    parameter["schema"] = {"type": "string", "enum": hub.stores}
    api = schemathesis.openapi.from_dict(meant)
    api.config.update(base_url=hub.base)
    found = [result.ok() for result in api.get_all_operations()]
    return [operation for operation in found if not re.search(LEFT_OUT, operation.path)]


def test_every_path_answers_as_it_says(operations, hub):
    assert len(operations) > 40
    for operation in operations:

        @settings(
            max_examples=4, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def check(case):
            case.call_and_validate(headers=hub.bearer, checks=[not_a_server_error, response_schema_conformance])

        check()


def test_every_command_has_a_path_with_its_own_fields(document):
    path = "/api/v1/stores/{store}/sessions/{session}/commands/forkRun"
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    (reference,) = [schema["$ref"]] if "$ref" in schema else [one["$ref"] for one in schema["allOf"]]
    fields = document["components"]["schemas"][reference.rpartition("/")[2]]["properties"]
    assert {"recipe", "selection", "values", "beside"} <= fields.keys()
    kinds = {path.rpartition("/")[2] for path in document["paths"] if "/commands/" in path}
    assert {command.kind for command in COMMANDS} - kinds == {"exportSubset", "adoptScan"}
