"""TRL's GRPO with any divergence to the reference and its exact gradient: the reward is the share of w3.

python examples/trl_grpo.py        about 15 s on one thread, no downloads
"""

import tempfile

from datasets import Dataset
from tiny_world import language_model, prompts, tokenizer
from trl import GRPOConfig

from fdiv import GRPO, JS, MonteCarlo
from fdiv.adapters.trl import GRPOTrainer


def share_of_w3(completions, **_):
    return [text.split().count("w3") / 8 for text in completions]


def train(method, folder):
    trainer = GRPOTrainer(
        method=method,
        model=folder,  # policy and reference both start here
        reward_funcs=share_of_w3,
        args=GRPOConfig(
            output_dir=folder,
            max_steps=40,
            per_device_train_batch_size=64,
            num_generations=8,
            max_completion_length=8,
            learning_rate=5e-3,
            logging_steps=8,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts(256)}),
        processing_class=tokenizer(),
    )
    trainer.train()
    return [row for row in trainer.state.log_history if "reward" in row]


def main():
    with tempfile.TemporaryDirectory() as folder:
        language_model(seed=0, width=32).save_pretrained(folder)
        weak, strong = (train(GRPO(JS(0.5), MonteCarlo(), beta=beta), folder) for beta in (0.01, 1.0))
    print("        beta = 0.01           beta = 1")
    print("step  reward  JS a token  reward  JS a token")
    for a, b in zip(weak, strong, strict=True):
        numbers = a["reward"], a["divergence"], b["reward"], b["divergence"]
        print("{:4d}  {:6.3f}  {:10.4f}  {:6.3f}  {:10.4f}".format(a["step"], *numbers))
    assert weak[-1]["reward"] > weak[0]["reward"] and strong[-1]["divergence"] < weak[-1]["divergence"]


if __name__ == "__main__":
    main()
