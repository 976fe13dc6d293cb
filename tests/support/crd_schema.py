"""The schema of a CustomResourceDefinition as the API server takes it: with defaults, and closed.

Plain JSON Schema knows neither; `x-kubernetes-*` marks are read where they matter here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml


def load_schema(file: Path, version: str = "v1") -> dict[str, Any]:
    """The closed schema of one served version."""
    definition = yaml.CSafeLoader(file.read_text()).get_single_data()
    (found,) = [each for each in definition["spec"]["versions"] if each["name"] == version]
    schema = found["schema"]["openAPIV3Schema"]
    # The API server checks metadata by rules of its own; the definition leaves it open.
    schema["properties"]["metadata"] = {"type": "object"}
    return _closed(schema)


def problems(schema: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest, each with its path."""
    _fill(schema, manifest)
    validator = jsonschema.Draft7Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = {key: _closed(value) for key, value in schema.items()}
    is_object = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if is_object and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


def _fill(schema: dict[str, Any], value: Any) -> None:
    if isinstance(value, dict):
        for key, part in schema.get("properties", {}).items():
            if key not in value and "default" in part:
                value[key] = part["default"]
            if key in value:
                _fill(part, value[key])
    elif isinstance(value, list):
        for item in value:
            _fill(schema.get("items", {}), item)
