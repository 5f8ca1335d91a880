"""What `--json` printed, checked against the schema that is published for it."""

from __future__ import annotations

import json
from typing import Any

from json_schemas import FOLDER

try:
    import jsonschema
except ModuleNotFoundError:
    jsonschema = None


def checked(name: str, printed: str) -> dict[str, Any]:
    """The one line of JSON that a command printed.

    It must be what docs/schemas/NAME.json says, with no key that the schema does not name; and it must not pass without
    any one of the required keys. Without jsonschema only the keys are checked.
    """
    (line,) = printed.splitlines()
    value: dict[str, Any] = json.loads(line)
    schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    required = set(schema["required"])
    assert required <= set(value) <= set(schema["properties"]), f"{name}: {sorted(value)}"
    if jsonschema:
        validator = jsonschema.Draft202012Validator(schema)
        validator.validate(value)
        for key in required:
            assert not validator.is_valid({other: item for other, item in value.items() if other != key})
    return value
