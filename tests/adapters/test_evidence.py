"""Heads read from models: what the estimators see of them is what the models themselves say."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PhiConfig

import fdiv
from fdiv.adapters._evidence import evidence, head_of, hidden_states, log_prob_of, log_softmax

SIZE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "soft-cap": Gemma2Config(**SIZE, head_dim=8, final_logit_softcapping=1.0, query_pre_attn_scalar=8),
    "scale": CohereConfig(**SIZE, logit_scale=0.3),
    "inverse scale": GraniteConfig(**SIZE, logits_scaling=4.0),
    "bias": PhiConfig(**SIZE),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def model(request):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(request.param).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def test_log_probabilities_are_those_of_the_models_own_logits(model):
    ids = torch.arange(6).reshape(1, 6) + 3
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids).logits[0, :-1].log_softmax(-1)
        hidden = hidden_states(model, ids, None, mask)
        head = head_of(model)
        torch.testing.assert_close(log_softmax(hidden, head), expected)
        chosen = expected.gather(-1, ids[0, 1:, None]).squeeze(-1)
        torch.testing.assert_close(log_prob_of(hidden, head, ids[0, 1:]), chosen)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_fused_and_exact_evidence_have_one_value(model, temperature):
    ids = torch.arange(6).reshape(1, 6) + 3
    mask = torch.ones_like(ids, dtype=torch.bool)
    values = []
    for estimator in (fdiv.FusedLinear(), fdiv.Exact()):
        method = fdiv.GKD(fdiv.JS(0.3), estimator, temperature=temperature)
        with torch.no_grad():
            hidden, head = hidden_states(model, ids, None, mask), head_of(model)
            values.append(method(**evidence(method, hidden.flip(0), head, hidden.roll(1, 0), head)).loss)
    torch.testing.assert_close(*values)
