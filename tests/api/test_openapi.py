"""The OpenAPI document, as it was agreed. After a wanted change, write it anew with

python -m tests.api.test_openapi
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from app.main import create_app
from tests.api.conftest import settings
from tests.fakes import build_world

SNAPSHOT = Path(__file__).with_name("openapi.json")


def document() -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        service = build_world(Path(folder)).service
        found = create_app(service, settings()).openapi()
        service.close()
    return found


def render(found: dict[str, Any]) -> str:
    return json.dumps({**found, "info": {**found["info"], "version": "0"}}, indent=1) + "\n"


def test_the_document_is_the_one_agreed() -> None:
    assert render(document()) == SNAPSHOT.read_text(encoding="utf-8"), __doc__


def test_every_operation_is_summed_up_tagged_and_documents_its_problems() -> None:
    for path, operations in document()["paths"].items():
        for verb, operation in operations.items():
            assert operation["summary"], (path, verb)
            assert operation["tags"], (path, verb)
            if path.startswith("/v1/"):
                error = operation["responses"]["401"]["content"]["application/json"]
                assert error["schema"] == {"$ref": "#/components/schemas/OpenAIError"}
            elif path not in ("/livez", "/readyz"):
                problem = operation["responses"]["401"]["content"]["application/problem+json"]
                assert problem["schema"] == {"$ref": "#/components/schemas/Problem"}


def test_every_reference_leads_somewhere() -> None:
    text = json.dumps(document())
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= document()["components"]["schemas"].keys()


if __name__ == "__main__":
    SNAPSHOT.write_text(render(document()), encoding="utf-8")
