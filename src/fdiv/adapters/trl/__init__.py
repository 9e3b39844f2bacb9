"""TRL's trainers with the loss of an fdiv method: one more argument, everything else is TRL's.

from fdiv.adapters.trl import DPOTrainer
DPOTrainer(method=FDPO(KL()), model=..., args=DPOConfig(...), train_dataset=...).train()
"""

try:
    import trl
except ImportError as error:
    raise ImportError('fdiv.adapters.trl needs TRL 1.16: pip install "fdiv[trl]"') from error

if not trl.__version__.startswith("1.16."):
    raise ImportError(
        f"fdiv.adapters.trl overrides functions below TRL's public surface and supports TRL 1.16.*, found "
        f'{trl.__version__}: pip install "trl==1.16.*"'
    )

from fdiv.adapters.trl.distillation import DistillationTrainer as DistillationTrainer
from fdiv.adapters.trl.dpo import DPOTrainer as DPOTrainer
from fdiv.adapters.trl.grpo import GRPOTrainer as GRPOTrainer
