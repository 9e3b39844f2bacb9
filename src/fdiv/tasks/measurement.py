"""What a language model is measured by: its next tokens of held-out text, and its own text by the reference.

Intervals are over sequences: what other text might have given, not other seeds.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fdiv._divergence import Divergence
from fdiv.adapters.transformers import CausalLM
from fdiv.evaluate.calibration import ece_null, expected_calibration_error, reliability
from fdiv.evaluate.diversity import distinct_n
from fdiv.evaluate.intervals import bootstrap_interval
from fdiv.sample._sampler import Decoding
from fdiv.tasks._task import Text
from fdiv.tasks.padding import trimmed
from fdiv.tasks.prompting import uniform

ROWS = 1024  # tokens whose distributions are held at once
SHOWN = 4  # prompts whose answers go into the report
Measures = dict[str, Divergence]


@torch.no_grad()
def measured(
    task: Any,
    model: CausalLM,
    reference: CausalLM | None,
    held_out: Text,
    prompts: Text,
    measures: Measures,
    seed: int,
    judge: Callable[[Text], Tensor] | None = None,
) -> tuple[dict, Text]:
    """(what an evaluation says, the answers sampled to the prompts).

    reference: None where it reads other tokens: no comparison then. judge: 0 or 1 for each answer.
    """
    model.model.eval()
    rows = per_token(model, reference, held_out, measures)
    draws = uniform(len(prompts.ids), task.answer_length, torch.Generator().manual_seed(seed))
    written = task.answer(model, prompts, draws, Decoding())
    shown = spread(len(prompts.ids), SHOWN)
    greedy = task.answer(model, prompts.rows(shown), draws[shown], Decoding(temperature=0))
    if reference is not None:
        rows["teacher NLL of samples"] = -likelihood(reference, written)
    confidence, correct = (rows[name][~np.isnan(rows[name])] for name in ("confidence", "correct"))
    scalars, errors = _means(rows)
    scalars["ece"] = expected_calibration_error(confidence, correct)
    scalars["ece_null"] = ece_null(confidence, seed=seed, resamples=50)
    scalars["distinct-2"] = distinct_n(responses(written), 2)
    errors["ece"] = error(np.stack([rows["confidence"], rows["correct"]], -1), _ece)
    calibration = {"ece": scalars["ece"], "ece_null": scalars["ece_null"]}
    result = {
        "exact": False,
        "scalars": scalars,
        "scalar_errors": errors,
        "divergences": {name: scalars[name] for name in measures if reference is not None},
        "calibration": calibration | {"bins": reliability(confidence, correct)},
        "curves": {},
        "samples": _samples(model, greedy, written.rows(shown), judge),
    }
    return result, written


def _means(rows: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, float]]:
    """(means over all tokens, their standard errors)"""
    told = {name: row for name, row in rows.items() if name not in ("confidence", "correct", "nll")}
    means = {"perplexity": math.exp(np.nanmean(rows["nll"]))}
    errors = {"perplexity": error(rows["nll"], lambda x: math.exp(np.nanmean(x)))}
    means |= {name: float(np.nanmean(row)) for name, row in told.items()}
    errors |= {name: error(row) for name, row in told.items()}
    return means, errors


@torch.no_grad()
def per_token(
    model: CausalLM, reference: CausalLM | None, text: Text, measures: Measures
) -> dict[str, np.ndarray]:
    """Numbers of each predicted token, [N, S - 1], nan elsewhere; distributions live a few rows long."""
    parts = []
    for some in _few(text):
        ids, mask = (t.to(model.model.device) for t in some)
        log_q = model.log_softmax(ids, mask)
        label, (confidence, guess) = model.labels(ids, mask), log_q.max(-1)
        part = {"nll": -log_q.gather(-1, label.unsqueeze(-1)).squeeze(-1)}
        part["entropy"] = -(log_q.exp() * log_q).sum(-1)
        part["confidence"], part["correct"] = confidence.exp(), (guess == label).float()
        if reference is not None:
            log_p = log_q if model is reference else reference.log_softmax(ids, mask)
            part["teacher agreement"] = (guess == log_p.argmax(-1)).float()
            part |= {name: divergence(log_p, log_q) for name, divergence in measures.items()}
        parts.append(part)
    return {name: _in_places(torch.cat([p[name] for p in parts]), text.mask) for name in parts[0]}


@torch.no_grad()
def likelihood(reference: CausalLM, text: Text) -> np.ndarray:
    """log p of each masked token, [N, S - 1], nan elsewhere."""
    device = reference.model.device
    parts = [reference.token_log_probs(*(t.to(device) for t in some)) for some in _few(text)]
    return _in_places(torch.cat(parts), text.mask)


def responses(text: Text) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(*text, strict=True)]


def spread(count: int, most: int) -> Tensor:
    """At most `most` of `count` places, evenly spread."""
    return torch.linspace(0, count - 1, min(most, count)).long()


def error(items: np.ndarray, statistic=np.nanmean) -> float:
    """Standard error by bootstrap over sequences, the first dimension."""
    _, low, high = bootstrap_interval(items, statistic, level=0.6827, resamples=300)
    return (high - low) / 2


def _few(text: Text) -> list[Text]:
    """A few sequences at a time."""
    size = max(1, ROWS // text.ids.shape[1])
    return [trimmed(Text(*some)) for some in zip(text.ids.split(size), text.mask.split(size), strict=True)]


def _in_places(rows: Tensor, mask: Tensor) -> np.ndarray:
    box = torch.full(mask[:, 1:].shape, torch.nan, dtype=torch.float64)
    box[mask[:, 1:].cpu()] = rows.double().cpu()
    return box.numpy()


def _ece(pairs: np.ndarray) -> float:
    confidence, correct = pairs[~np.isnan(pairs[..., 0])].T
    return expected_calibration_error(confidence, correct)


def _samples(model: CausalLM, greedy: Text, drawn: Text, judge) -> list[dict]:
    def told(ids: Tensor) -> str:
        return model.tokenizer.decode(ids, skip_special_tokens=True)

    verdicts = [judge(text).bool().tolist() for text in (greedy, drawn)] if judge else []
    return [
        {
            "prompt": told(best[: int(mark.int().argmax())]),
            "outputs": [f"[greedy] {told(best[mark])}", f"[sampled] {told(ids[mask])}"],
            "valid": [verdict[n] for verdict in verdicts] or None,
        }
        for n, (best, mark, ids, mask) in enumerate(zip(*greedy, *drawn, strict=True))
    ]
