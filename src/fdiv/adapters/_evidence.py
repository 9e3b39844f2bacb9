"""What an estimator sees of causal language models of the transformers library, at chosen tokens.

Only the backbone runs; the head is applied to the chosen rows alone, or handed over as it is. So logits of
prompts and padding never exist, and under an estimator that sees heads none do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fdiv.estimate._heads import Head
from fdiv.estimate.fused_log_prob import FusedLogProb
from fdiv.methods._method import Method

IGNORED = -100  # the label of a token that takes no part in the loss


def backbone_of(model: Any) -> Any:
    """The model without its head; adapters that live inside its layers (LoRA) stay in effect."""
    if any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values()):
        raise ValueError(
            "prompt-learning adapters (prompt tuning, prefix tuning, P-tuning) live outside the backbone, "
            "which is all that runs here; use one that changes weights, such as LoRA"
        )
    return (model.get_base_model() if hasattr(model, "peft_config") else model).base_model


def head_of(model: Any) -> Head:
    """The output projection with the bias, scale and soft-cap of the model's logits."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if not isinstance(layer, torch.nn.Linear):
        raise ValueError(
            f"the head of {type(model).__name__} is a {type(layer).__name__}, and only that of a plain "
            "Linear is read: leave the head out of target_modules and of quantisation"
        )
    if getattr(config, "output_multiplier", None) not in (None, 1.0):
        raise ValueError(
            f"the logits of {type(model).__name__} have output_multiplier={config.output_multiplier}, "
            "which is not supported yet"
        )
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def hidden_states(model: Any, input_ids: Tensor, attention_mask: Tensor | None, mask: Tensor) -> Tensor:
    """The final hidden states that predict the tokens where mask [B, S] is true: [tokens, width]."""
    out = backbone_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    states = out.last_hidden_state
    return states[:, :-1][mask[:, 1:].to(states.device)]  # position i predicts token i + 1


def log_softmax(hidden: Tensor, head: Head) -> Tensor:
    """Log-probabilities [rows, vocab], in float32 at least and outside autocast."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = linear(hidden.to(dtype), head.weight.to(dtype), bias) * head.scale
        if head.softcap:
            logits = head.softcap * (logits / head.softcap).tanh()
        return (logits / head.temperature).log_softmax(-1)


def log_prob_of(hidden: Tensor, head: Head, index: Tensor) -> Tensor:
    """Log-probability of the token `index` [rows] in each row: [rows]."""
    return FusedLogProb()(hidden, head, index).log_prob


def entropy_of_some(hidden: Tensor, head: Head, rows: int = 64) -> Tensor:
    """The entropy, in nats, of at most `rows` of the rows, evenly spaced: a mean to log needs no more."""
    with torch.no_grad():
        log_q = log_softmax(hidden[:: 1 + len(hidden) // rows], head)
        return -(log_q.exp() * log_q).sum(-1)


def evidence(method: Any, p_hidden: Tensor, p_head: Head, q_hidden: Tensor, q_head: Head) -> dict[str, Any]:
    """What the method's estimator sees of teacher p and student q, the method's temperature applied."""
    temperature = getattr(method, "temperature", 1.0)
    p_head, q_head = (head._replace(temperature=temperature) for head in (p_head, q_head))
    if method.estimator.sees == "heads":
        return {"p_hidden": p_hidden, "p_weight": p_head, "q_hidden": q_hidden, "q_weight": q_head}
    with torch.no_grad():
        log_p = log_softmax(p_hidden, p_head)
    return {"log_p": log_p, "log_q": log_softmax(q_hidden, q_head)}


def batch_evidence(method: Method, student: Any, teacher: Any, batch: Any) -> dict[str, Tensor]:
    """What a method that consumes "tokens" or "responses" is called with on a batch of a causal LM.

    batch: input_ids and labels [B, S], IGNORED where a token takes no part, attention_mask if there is any.
    Every tensor has one row for each token with a label.
    """
    if "labels" not in batch:
        raise ValueError(
            f"a batch needs labels, {IGNORED} where a token takes no part, got {', '.join(batch)}; let the "
            "collator make them"
        )
    ids, attention, labels = batch["input_ids"], batch.get("attention_mask"), batch["labels"]
    mask = labels != IGNORED
    q_hidden, q_head = hidden_states(student, ids, attention, mask), head_of(student)
    if method.consumes == "tokens":
        return {"log_q": log_prob_of(q_hidden, q_head, labels[:, 1:][mask[:, 1:]])}
    with torch.no_grad():
        p_hidden, p_head = hidden_states(teacher, ids, attention, mask), head_of(teacher)
    return evidence(method, p_hidden, p_head, q_hidden, q_head)


def rows_of(tensors: dict[str, Tensor]) -> Tensor:
    """The number of tokens that the evidence is about."""
    rows = tensors["q_hidden"] if "q_hidden" in tensors else tensors["log_q"]
    return torch.tensor(len(rows), device=rows.device)


def sums_over(method: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums to evaluate by: "tokens", the "loss" and, if there is a teacher, the estimator's "divergence"."""
    tokens = rows_of(tensors)
    sums = {"tokens": tokens, "loss": method(**tensors).loss * tokens}
    if method.consumes == "responses":
        rows = method.estimator(method.divergence, *(tensors[name] for name in method.estimator.evidence))
        sums["divergence"] = rows.sum()
    return sums


def check_models(student: Any, teacher: Any) -> None:
    """Raise unless both models can be read here and their heads compared, atom by atom."""
    if getattr(student.config, "output_router_logits", False):
        raise ValueError(
            f"{type(student).__name__} asks for the loss of its router, which would not be added here; set "
            "model.config.output_router_logits = False"
        )
    models = (student,) if teacher is None else (student, teacher)
    for model in models:
        backbone_of(model)
    ours, *theirs = (len(head_of(model).weight) for model in models)
    if theirs and theirs != [ours]:
        raise ValueError(
            f"the student has {ours} tokens and the teacher {theirs[0]}: distillation compares them one by "
            "one, so both need the same tokenizer and heads of one size"
        )


def as_forward(wrapper: Any, model: Any, function: Callable, *args: Any) -> Any:
    """function(*args), run as the forward pass of `model` inside its DDP wrapper, whose hooks must see it."""
    if wrapper is model:
        return function(*args)
    forward = model.forward

    def once(*inner: Any) -> Any:
        model.forward = forward
        return function(*inner)

    model.forward = once
    try:
        return wrapper(*args)
    finally:
        model.forward = forward
