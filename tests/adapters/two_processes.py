"""One step of each host on eight rows, shared by as many processes as there are; the first one saves it.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.adapters.two_processes FOLDER
"""

import sys
from pathlib import Path

import lightning
import torch
import transformers
from datasets import Dataset
from tests.adapters import tiny
from torch.utils.data import DataLoader
from trl.experimental.gkd.gkd_config import GKDConfig

from fdiv import GKD, JS, FusedLinear
from fdiv.adapters.lightning import MethodModule
from fdiv.adapters.trainer import Trainer
from fdiv.adapters.trl.gkd import GKDTrainer

METHOD = GKD(JS(0.3), FusedLinear())
OPTIONS = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "optim": "sgd"}


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.batch = tiny.responses(8)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: tensor[i] for name, tensor in self.batch.items()}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5)


def under_trainer(folder, processes):
    host = Trainer(
        method=METHOD,
        teacher=tiny.model(0),
        model=tiny.model(1),
        args=transformers.TrainingArguments(
            str(folder),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4 // processes,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            **OPTIONS,
        ),
        train_dataset=Rows(),
    )
    assert host.accelerator.num_processes == processes
    host.train()
    return host.accelerator.unwrap_model(host.model)


def under_gkd(folder, processes):
    batch = tiny.responses(8)
    batch |= {"prompts": batch["input_ids"][:, :3], "prompt_attention_mask": batch["attention_mask"][:, :3]}
    host = GKDTrainer(
        method=METHOD,
        teacher_model=tiny.model(0),
        model=tiny.model(1),
        args=GKDConfig(
            str(folder),
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4 // processes,
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            bf16=False,
            gradient_checkpointing=False,
            **OPTIONS,
        ),
        data_collator=torch.utils.data.default_collate,
        train_dataset=Dataset.from_dict({k: t.tolist() for k, t in batch.items()}).with_format("torch"),
        processing_class=tiny.tokenizer(),
    )
    host.train()
    return host.accelerator.unwrap_model(host.model)


def under_lightning(folder, processes):
    host = MethodModule(method=METHOD, teacher=tiny.model(0), model=tiny.model(1), optimizer=sgd)
    lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=4 // processes,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    ).fit(host, DataLoader(Rows(), batch_size=2))
    return host.model


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(folder, processes):
    """What the step adds to the weights, by host."""
    start = weights(tiny.model(1))
    hosts = {"trainer": under_trainer, "gkd": under_gkd, "lightning": under_lightning}
    return {name: weights(run(folder, processes)) - start for name, run in hosts.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    steps = moved(folder, 2)
    if torch.distributed.get_rank() == 0:
        torch.save(steps, folder / "steps.pt")
