"""TRL's DPO under any divergence to the reference: pairs whose chosen response says w3.

python examples/trl_dpo.py        about 10 s on one thread, no downloads
"""

import tempfile

from datasets import Dataset
from tiny_world import language_model, prompts, tokenizer
from trl import DPOConfig

from fdiv import FDPO, JS
from fdiv.adapters.trl import DPOTrainer


def pairs(number):
    asked = prompts(number)
    words = [prompt.split() for prompt in asked]
    chosen = [f" {first} w3 {last}" for first, _, last in words]
    rejected = [f" {first} {middle} {last}" for first, middle, last in words]
    return Dataset.from_dict({"prompt": asked, "chosen": chosen, "rejected": rejected})


def main():
    with tempfile.TemporaryDirectory() as folder:
        language_model(seed=0, width=32).save_pretrained(folder)
        trainer = DPOTrainer(
            # ReverseKL() is DPO itself; KL(), 2 * JS(0.5), Alpha(0.5), ... keep to the reference otherwise.
            method=FDPO(2 * JS(0.5), beta=0.5),
            model=folder,  # policy and reference both start here
            args=DPOConfig(
                output_dir=folder,
                max_steps=50,
                per_device_train_batch_size=16,
                learning_rate=1e-3,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=pairs(256),
            processing_class=tokenizer(),
        )
        trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    print("step    loss  accuracy  margin of the rewards  log ratio of the chosen")
    for row in rows:
        numbers = row["rewards/accuracies"], row["rewards/margins"], row["log_ratio_chosen"]
        print("{:4d}  {:6.4f}  {:8.3f}  {:21.3f}  {:23.3f}".format(row["step"], row["loss"], *numbers))
    assert rows[-1]["loss"] < rows[0]["loss"], "the loss should fall"


if __name__ == "__main__":
    main()
