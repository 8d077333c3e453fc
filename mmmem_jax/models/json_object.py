"""JSON files of a model's folder."""

import json
from pathlib import Path
from typing import Any

from mmmem_jax.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: if the file is missing, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}; take it from the model's folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object; fetch it again")
    return found
