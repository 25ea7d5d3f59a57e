"""Models without weights, from their configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from veneer.errors import BadFile, MissingExtra


def skeleton(name_or_path: str) -> nn.Module:
    """The model of a configuration, without weights (on the meta device).

    Args:
        name_or_path: a folder with config.json or a model's name on the hub; the architecture named there is
            preferred, else the plain backbone is built. Folders of diffusers models work too.

    Raises:
        BadFile: no readable configuration there, or one that no installed library knows.
    """
    import torch

    name_or_path = network_of(name_or_path)
    known = _diffusers_config(Path(name_or_path))
    if known:
        return _diffusers_model(known, name_or_path)
    import transformers

    from veneer import models

    models.register()
    try:
        config = transformers.AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadFile(
            f"{name_or_path!r} gives no model configuration: {reason}\nGive a folder with config.json or a model's name."
        ) from error
    known_classes = (getattr(transformers, name, None) or models.architecture(name) for name in config.architectures or ())
    named = next((cls for cls in known_classes if cls), None)
    with torch.device("meta"):
        return named(config) if named else transformers.AutoModel.from_config(config)


def with_weights(model: nn.Module, name_or_path: str) -> nn.Module:
    """The model of a skeleton again, with its weights. Raises `BadFile` if they cannot be had."""
    cls: Any = type(model)
    try:
        return cls.from_pretrained(network_of(name_or_path)).eval()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadFile(f"The weights of {name_or_path!r} could not be loaded: {reason}") from error


def network_of(name_or_path: str) -> str:
    """The folder of the network in a pipeline's folder; any other name as it is."""
    folder = Path(name_or_path)
    inside = [folder / part for part in ("unet", "transformer") if (folder / part).is_dir()]
    return str(inside[0]) if inside and (folder / "model_index.json").is_file() else name_or_path


def _diffusers_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and "_class_name" in config else {}


def _diffusers_model(config: dict[str, Any], where: str) -> nn.Module:
    import torch

    try:
        import diffusers
    except ImportError as error:
        raise MissingExtra(f"{where!r} is a diffusers model. Install it with: pip install diffusers") from error
    cls = getattr(diffusers, str(config["_class_name"]), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise BadFile(f"{where!r} names the class {config['_class_name']!r}, which the installed diffusers does not have.")
    with torch.device("meta"):
        return cls.from_config(config)  # type: ignore[attr-defined]
