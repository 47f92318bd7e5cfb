"""Every path, given what its schema allows and what it does not: it answers as the schema says, and never breaks."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

# They start children that load torch, stop the training that other tests use, or are streams.
LEFT_OUT = r"/(verify|fsck|compare|commands/(stop|resetSession|switchRun))$"


@pytest.fixture(scope="module")
def document(hub):
    return hub.http.get("/api/v1/openapi.json").json()


@pytest.fixture(scope="module")
def api(hub, document):
    # The one store that there is, instead of names that are none.
    text = json.dumps(document)
    for paths in document["paths"].values():
        for operation in paths.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "store":
                    parameter["schema"] = {"type": "string", "enum": hub.stores}
    assert "store" in text
    found = schemathesis.openapi.from_dict(document)
    found.config.update(base_url=hub.base)
    return found


loaded = schemathesis.pytest.from_fixture("api").exclude(path_regex=LEFT_OUT)


@loaded.parametrize()
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_path_answers_as_it_says(case, hub):
    case.call_and_validate(headers=hub.bearer, checks=[not_a_server_error, response_schema_conformance])


def test_every_command_has_a_path_with_its_own_fields(document):
    body = document["paths"]["/api/v1/stores/{store}/sessions/{session}/commands/forkRun"]["post"]["requestBody"]
    fields = json.dumps(body["content"]["application/json"]["schema"])
    name = fields.rpartition("/")[2].rstrip('"}] ')
    assert {"recipe", "selection", "values", "beside"} <= document["components"]["schemas"][name]["properties"].keys()
