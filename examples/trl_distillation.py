"""TRL's on-policy distillation under any divergence: the student writes, the teacher is its measure.

python examples/trl_distillation.py        about 10 s on one thread, no downloads
"""

import tempfile

from datasets import Dataset
from tiny_world import language_model, prompts, tokenizer
from trl import DistillationConfig

from fdiv import GKD, JS, FusedLinear
from fdiv.adapters.trl import DistillationTrainer


def main():
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            # Any divergence and any estimator that sees the vocabulary: KL(), Alpha(0.5), TopK(8), ...
            method=GKD(JS(0.5), FusedLinear(), lmbda=1.0),
            model=language_model(seed=1, width=32),
            teacher_model=language_model(seed=0, width=64),
            args=DistillationConfig(
                output_dir=folder,
                max_steps=60,
                per_device_train_batch_size=32,
                gradient_accumulation_steps=2,
                max_completion_length=8,
                learning_rate=5e-3,
                logging_steps=10,
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
    rows = [row for row in trainer.state.log_history if "loss" in row]
    print("step  JS(teacher, student)  entropy of the student")
    for row in rows:
        print(f"{row['step']:4d}  {row['loss']:20.4f}  {row['entropy']:22.3f}")
    assert rows[-1]["loss"] < rows[0]["loss"], "the divergence should fall"


if __name__ == "__main__":
    main()
