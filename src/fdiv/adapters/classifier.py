"""A small network over inputs with labels, as teacher and as student."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fdiv import notation
from fdiv.networks._network import Architecture, Network

CONFIG, WEIGHTS = "network.json", "model.safetensors"


@dataclass(eq=False)
class Classifier:
    """A network, what it was built from, and the method that says how its scores are read.

    method: one with `log_probs(logits)`, where scores are not those of a softmax; it is saved beside the
    weights. For a regression the scores are the prediction.
    """

    model: Network
    architecture: Architecture
    shape: torch.Size
    outputs: int
    method: Any = None

    vocabulary = tokenizer = None  # the outputs are named by their number

    @classmethod
    def fresh(cls, architecture: Architecture, shape: torch.Size, outputs: int, seed: int) -> "Classifier":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(architecture.build(shape, outputs), architecture, shape, outputs)

    @classmethod
    def load(cls, path: str | Path, architecture: Architecture | None = None) -> "Classifier":
        """The network that `save` wrote into the folder `path`.

        architecture: what it is, if fdiv does not know its name.
        """
        path = Path(path)
        if not (path / CONFIG).is_file():
            raise FileNotFoundError(f"{path} holds no {CONFIG}, so no network that Classifier.save wrote")
        config = json.loads((path / CONFIG).read_text())
        shape, outputs = torch.Size(config["shape"]), config["outputs"]
        made = cls.fresh(architecture or _parse(config["network"]), shape, outputs, seed=0)
        made.model.load_state_dict(load_file(path / WEIGHTS))
        made.method = _parse(config["method"]) if config["method"] else None
        return made

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        config = {"network": repr(self.architecture), "shape": list(self.shape), "outputs": self.outputs}
        config["method"] = repr(self.method) if self.method is not None else None
        (path / CONFIG).write_text(json.dumps(config, indent=1))
        save_file(
            {k: v.detach().cpu().contiguous() for k, v in self.model.state_dict().items()}, path / WEIGHTS
        )

    @property
    def true_size(self) -> int:
        return self.outputs

    size = true_size

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def fingerprint(self) -> str:
        found = hashlib.sha256(repr((self.architecture, self.shape, self.outputs)).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            found.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
        return found.hexdigest()[:16]

    def log_probs(self, inputs: Tensor) -> Tensor:
        """Log-probabilities of the classes [B, C], as the method reads the scores."""
        scores = self.model(inputs)
        return scores.log_softmax(-1) if self.method is None else self.method.log_probs(scores)


def _parse(text: str) -> Any:
    return notation.parse(text, ["fdiv.networks.all"])
