"""What both apps of a deployment share: the recipe of a machine, and who a client says that it is."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from federated.encodings import PayloadError
from federated.recipe import FederateRecipe
from raytrain.overrides import parse_overrides
from raytrain.recipe import read_toml

SHIPPED_RECIPES = Path(__file__).parents[1] / "recipes"
WHO = "who"
"""Name of the query by which the server learns who is there."""


def recipe_of(config: Mapping[str, Any]) -> FederateRecipe:
    """Return the recipe that a machine's own configuration names, with its changes: nothing of it comes by messages.

    Args:
        config: `recipe`, a file or a shipped recipe, and `set`, changes as on the command line.

    Raises:
        RecipeError: there is no such recipe, or it is wrong.
    """
    raw, file = read_toml(str(config["recipe"]), [SHIPPED_RECIPES])
    changes = parse_overrides(shlex.split(str(config.get("set", ""))))
    return FederateRecipe.parse_with({"kind": "federate", "name": file.stem, **raw}, changes)


def introduction(client: int, origin: str) -> RecordDict:
    """Return what a client says of itself.

    Args:
        client: its number.
        origin: the digest of what it begins with.
    """
    return RecordDict({WHO: ConfigRecord({"client": client, "origin": origin})})


def introduced(content: RecordDict) -> tuple[int, str]:
    """Return what a client says of itself: its number, and the digest of what it begins with.

    Raises:
        PayloadError: it says something else.
    """
    record = content.get(WHO)
    said = dict(record) if isinstance(record, ConfigRecord) else {}
    client, origin = said.get("client"), said.get("origin")
    if not isinstance(client, int) or not isinstance(origin, str) or client < 0:
        raise PayloadError("expected a client's number and the digest of what it begins with")
    return client, origin
