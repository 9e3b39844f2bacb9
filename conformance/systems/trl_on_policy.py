"""One step of a real GKDTrainer of TRL on the student's own text, and what it divides by."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast, PrinterCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer

from conformance import world

PROMPTS = torch.tensor([[1, 2, 3], [4, 5, 6]])
RESPONSES = torch.tensor([[7, 8], [9, 1]])
WRITTEN = 12  # tokens a response of the student's own


class Trainer(GKDTrainer):
    """Keeps (tokens in the loss, what they are divided by) of its last step."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        self.counted = float((inputs["labels"][:, 1:] != -100).sum()), float(num_items_in_batch or 0)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def denominator() -> tuple[float, float]:
    words = {f"w{i}": i for i in range(10)} | {"<eos>": 10}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="<eos>",
        pad_token="<eos>",
    )
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=1.0,
            max_new_tokens=WRITTEN,
            max_steps=1,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
        )
        trainer = Trainer(
            model=world.language_model(2),
            teacher_model=world.language_model(1),
            args=config,
            data_collator=_batch,
            train_dataset=Dataset.from_dict({"messages": [[{"role": "user", "content": "w1"}]] * 2}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.counted


def _batch(rows: list) -> dict[str, Tensor]:
    ids = torch.cat([PROMPTS, RESPONSES], 1)
    labels = ids.clone()
    labels[:, : PROMPTS.shape[1]] = -100
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "prompts": PROMPTS,
        "prompt_attention_mask": torch.ones_like(PROMPTS),
    }
