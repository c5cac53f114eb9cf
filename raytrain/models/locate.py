"""Location of a Hugging Face model: a folder, a Python package, or the hub."""

import importlib
from pathlib import Path

from raytrain.data.records import is_local
from raytrain.errors import RecipeError

PACKAGE = "package:"


def locate_model(model: str, fresh: bool) -> str:
    """Return the folder of `task.model`, or its name on the hub.

    Raises:
        RecipeError: there is no such folder, or a file is missing in it.
    """
    if not model.startswith(PACKAGE) and not is_local(model):
        return model
    path = _of_package(model.removeprefix(PACKAGE)) if model.startswith(PACKAGE) else Path(model)
    if not path.is_dir():
        raise RecipeError(f"task.model: no such folder: {path}")
    if not (path / "config.json").is_file():
        raise RecipeError(
            f"task.model: {path} has no config.json; expected the folder of a Hugging Face model, with config.json, "
            "model.safetensors and the files of its tokenizer"
        )
    if not fresh and not any(path.glob("*.safetensors")):
        binary = any(path.glob("*.bin"))
        raise RecipeError(
            f"task.model: {path} has no weights (*.safetensors)"
            f"{', only *.bin, which could run any code and are never loaded' if binary else ''}; save them there with "
            "model.save_pretrained(), or set task.fresh=true to start from random ones"
        )
    return str(path)


def _of_package(name: str) -> Path:
    try:
        return Path(importlib.import_module(name).MODEL_DIR)
    except ImportError:
        raise RecipeError(
            f"task.model: there is no Python package {name!r} here; pip install {name.replace('_', '-')}, or name a "
            "folder"
        ) from None
    except AttributeError:
        raise RecipeError(f"task.model: the Python package {name!r} has no MODEL_DIR, which names its model") from None
