"""torchtune: its distillation losses, read from the one file of the package that holds them."""

import importlib.util
from importlib.metadata import version

import torch
from torch import Tensor

from conformance.system import Rows, System


def _losses():
    """The module torchtune.modules.loss.kd_losses; importing the package itself takes a matching torchao."""
    package = importlib.util.find_spec("torchtune")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'torchtune'")
    file = f"{package.submodule_search_locations[0]}/modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"no module at {file}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KD = _losses()


class Adapter(System):
    name = "torchtune"
    version = version("torchtune")

    def divergences(self) -> dict[str, Rows]:
        losses = {
            "forward KL": KD.ForwardKLLoss(),
            "reverse KL": KD.ReverseKLLoss(),
            "forward and reverse KL(0.3)": KD.SymmetricKLLoss(sym_kd_ratio=0.3),
        }
        return {name: _by_row(loss) for name, loss in losses.items()}

    def configure_jsd(self, beta: float) -> object:
        return KD.SymmetricKLLoss(sym_kd_ratio=beta)

    def mismatched_vocabulary(self, teacher: Tensor, student: Tensor) -> Tensor:
        return _by_row(KD.ReverseKLLoss())(teacher, student)

    def token_mean(self, teacher: Tensor, student: Tensor, mask: Tensor, count: int | None = None) -> Tensor:
        if count is None:
            return KD.ForwardKLLoss()(student, teacher, _labels(mask))
        return KD.ForwardKLLoss()(student, teacher, _labels(mask), normalize=False) / count

    def reductions(self):
        return {
            "ReverseKLWithChunkedOutputLoss": _chunked(
                KD.ReverseKLWithChunkedOutputLoss(num_output_chunks=2)
            ),
            "ForwardKLWithChunkedOutputLoss": _chunked(
                KD.ForwardKLWithChunkedOutputLoss(num_output_chunks=2)
            ),
            "ForwardKLLoss": self.token_mean,
        }

    def unknown_options(self):
        return {"ForwardKLLoss(temperature=2)": lambda: KD.ForwardKLLoss(temperature=2)}


def _labels(mask: Tensor) -> Tensor:
    return torch.where(mask, 0, -100)


def _by_row(loss) -> Rows:
    label = torch.zeros(1, dtype=torch.long)
    return lambda teacher, student: torch.stack(
        [loss(q, p, label) for p, q in zip(teacher.split(1), student.split(1), strict=True)]
    )


def _chunked(loss):
    def reduced(teacher: Tensor, student: Tensor, mask: Tensor) -> Tensor:
        halves = [list(t.unsqueeze(0).chunk(2, dim=1)) for t in (student, teacher)]
        return loss(*halves, _labels(mask).unsqueeze(0))

    return reduced
