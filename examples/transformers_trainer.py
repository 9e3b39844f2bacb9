"""A plain transformers.Trainer that distils under any divergence, on responses that the teacher wrote.

python examples/transformers_trainer.py        about 10 s on one thread, no downloads
"""

import tempfile

from tiny_world import language_model, responses
from transformers import TrainingArguments

from fdiv import GKD, FusedLinear, SkewKL
from fdiv.adapters.trainer import Trainer


def main():
    teacher = language_model(seed=0, width=64)
    examples = responses(teacher, 320)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            method=GKD(SkewKL(0.1), FusedLinear()),  # SFT() learns from the labels alone, without a teacher
            teacher=teacher,
            model=language_model(seed=1, width=32),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=80,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                learning_rate=5e-3,
                eval_strategy="steps",
                eval_steps=20,
                eval_on_start=True,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=examples[:256],
            eval_dataset=examples[256:],
        )
        trainer.train()
    rows = [row for row in trainer.state.log_history if "eval_divergence" in row]
    print("step  SkewKL(teacher, student) on held-out responses")
    for row in rows:
        print(f"{row['step']:4d}  {row['eval_divergence']:.4f}")
    assert rows[-1]["eval_divergence"] < rows[0]["eval_divergence"], "the divergence should fall"


if __name__ == "__main__":
    main()
