"""Distillation under any divergence in Lightning: the optimiser is yours, the teacher is in no checkpoint.

python examples/lightning_distillation.py        about 10 s on one thread, no downloads
"""

import tempfile

import lightning
import torch
from tiny_world import language_model, responses
from torch.utils.data import DataLoader

from fdiv import GKD, Alpha, TopK
from fdiv.adapters.lightning import MethodModule


class Table(lightning.Callback):
    def __init__(self):
        self.rows = []

    def on_validation_epoch_end(self, trainer, module):
        self.rows.append((trainer.global_step, trainer.callback_metrics["val_divergence"].item()))


def main():
    teacher = language_model(seed=0, width=64)
    examples, table = responses(teacher, 320), Table()
    module = MethodModule(
        method=GKD(Alpha(0.5), TopK(8)),  # eight tokens and the rest as one: a lower bound on Alpha(0.5)
        teacher=teacher,
        model=language_model(seed=1, width=32),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-3),
    )
    with tempfile.TemporaryDirectory() as folder:
        lightning.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            max_epochs=5,
            accumulate_grad_batches=2,
            num_sanity_val_steps=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[table],
        ).fit(module, DataLoader(examples[:256], batch_size=16, shuffle=True), DataLoader(examples[256:], 32))
    print("step  Alpha(0.5)(teacher, student) on held-out responses")
    for step, value in table.rows:
        print(f"{step:4d}  {value:.4f}")
    assert table.rows[-1][1] < table.rows[0][1], "the divergence should fall"


if __name__ == "__main__":
    main()
