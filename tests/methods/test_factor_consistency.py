"""Factor consistency: attributions of linear networks in closed form, and a law that training can follow."""

import math
from typing import NamedTuple

import pytest
import torch
from scipy.stats import kendalltau
from tests.worlds import close, each_divergence, gradient
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fdiv
from fdiv.methods._method import Method
from fdiv.methods.represent.factor_consistency import (
    FactorConsistency,
    attributions,
    kendall,
    log_normalised,
)

B, FACTORS, K = 12, 5, 3


class Data(NamedTuple):
    inputs: Tensor
    labels: Tensor


def world(seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(B, FACTORS, generator=generator, dtype=torch.float64)
    return Data(inputs, torch.randint(K, (B,), generator=generator))


def linear(seed=0):
    generator = torch.Generator().manual_seed(seed)
    network = nn.Linear(FACTORS, K, dtype=torch.float64)
    with torch.no_grad():
        network.weight.copy_(torch.randn(K, FACTORS, generator=generator, dtype=torch.float64))
        network.bias.copy_(torch.tensor([0.3, -0.2, 0.5]))
    return network


def curved(seed=0, factors=FACTORS):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(factors, 4), nn.Tanh(), nn.Linear(4, K)).double()


def permuted(network, order):
    """The network that reads factor order[j] where the other one reads factor j."""
    other = linear()
    with torch.no_grad():
        other.weight.copy_(network.weight[:, order])
        other.bias.copy_(network.bias)
    return other


def out_of(method, network, data, memory):
    return method(inputs=data.inputs, labels=data.labels, network=network, memory=memory)


# -- attributions --------------------------------------------------------------------------------------------


def test_a_linear_networks_attributions_are_its_centred_weights_times_the_inputs():
    data, network = world(), linear()
    inputs = data.inputs.clone().requires_grad_()
    weights = network.weight[data.labels] - network.weight.mean(0)
    close(attributions(network(inputs), inputs, data.labels), (weights * data.inputs).detach(), 1e-13)


def test_they_add_up_to_the_score_of_a_linear_network_without_a_bias():
    data, network = world(), linear()
    nn.init.zeros_(network.bias)
    inputs = data.inputs.clone().requires_grad_()
    z = network(inputs)
    score = z.gather(1, data.labels[:, None])[:, 0] - z.mean(1)
    close(attributions(z, inputs, data.labels).sum(1), score.detach(), 1e-12)


def test_a_number_added_to_every_score_changes_nothing():
    """As it does not change the softmax, though it may depend on the inputs."""
    data, network = world(), curved()
    inputs = data.inputs.clone().requires_grad_()
    z = network(inputs)
    shifted = z + inputs.square().sum(1, keepdim=True)
    close(
        attributions(shifted, inputs, data.labels), attributions(network(inputs), inputs, data.labels), 1e-12
    )


def test_the_law_is_measured_over_all_examples():
    data, network = world(), linear()
    mean = ((network.weight[data.labels] - network.weight.mean(0)) * data.inputs).abs().mean(0).detach()
    law = FactorConsistency().measure(network, data.inputs, data.labels)
    close(law.exp(), (mean + 1e-8) / (mean + 1e-8).sum(), 1e-13)
    assert not law.requires_grad and network.weight.grad is None


def test_many_examples_are_looked_at_in_chunks():
    data, network = world(), curved()
    many = Data(data.inputs.repeat(200, 1), data.labels.repeat(200))
    method = FactorConsistency()
    close(method.measure(network, *many), method.measure(network, *data), 1e-12)


# -- the loss ------------------------------------------------------------------------------------------------


@each_divergence
def test_identical_attributions_cost_the_task_alone_and_permuted_factors_more(divergence):
    data, network, method = world(), linear(), FactorConsistency(divergence)
    memory = method.initial_memory(data, network)
    out = out_of(method, network, data, memory)
    close(out.loss, cross_entropy(network(data.inputs), data.labels), 1e-9)
    assert out.metrics["divergence"].abs() < 1e-9 and out.metrics["rank_agreement"] == 1
    moved = out_of(method, permuted(network, [1, 2, 3, 4, 0]), data, memory)
    assert moved.metrics["divergence"] > 0.01 and moved.metrics["rank_agreement"] < 1


@each_divergence
def test_the_loss_is_cross_entropy_plus_the_divergence_of_the_laws(divergence):
    """p is the law to be followed, q the network's."""
    data, network, reference = world(), linear(1), linear(2)
    method = FactorConsistency(divergence, weight=0.3)
    laws = [method.measure(n, data.inputs, data.labels) for n in (reference, network)]
    memory = method.initial_memory(data, reference)
    close(memory["log_law"], laws[0], 1e-13)
    out = out_of(method, network, data, memory)
    expected = cross_entropy(network(data.inputs), data.labels) + 0.3 * divergence(*laws)
    close(out.loss, expected, 1e-11)


@pytest.mark.parametrize("divergence", [fdiv.KL(), fdiv.JS(0.3), fdiv.ReverseKL()], ids=repr)
def test_the_gradient_goes_through_the_attributions(divergence):
    """Second derivatives, against finite differences."""
    data, network = world(), curved()
    method = FactorConsistency(divergence, weight=5.0)
    memory = method.initial_memory(data, curved(1))
    names = [name for name, _ in network.named_parameters()]

    def loss(*parameters):
        call = {
            "network": lambda x: torch.func.functional_call(
                network, dict(zip(names, parameters, strict=True)), x
            )
        }
        return method(inputs=data.inputs, labels=data.labels, memory=memory, **call).loss  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, tuple(network.parameters()), atol=1e-6)


def test_training_brings_the_law_to_the_references_without_losing_the_task():
    data, reference = world(), curved(3)
    labels = reference(data.inputs).argmax(1)
    data = Data(data.inputs, labels)
    values = {}
    for weight in (0.0, 2.0):
        network, method = curved(4), FactorConsistency(weight=weight)
        memory = method.initial_memory(data, reference)
        optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
        for _ in range(150):
            out = out_of(method, network, data, memory)
            optimiser.zero_grad()
            out.loss.backward()
            optimiser.step()
        values[weight] = out_of(method, network, data, memory).metrics
    assert values[2.0]["divergence"] < 0.1 * values[0.0]["divergence"]
    assert values[2.0]["cross_entropy"] < values[0.0]["cross_entropy"] + 0.1


def test_images_are_factors_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    data = Data(torch.randn(B, 1, 2, 3, generator=generator, dtype=torch.float64), world().labels)
    method, network = FactorConsistency(), curved(factors=6)
    memory = method.initial_memory(data, curved(1, factors=6))
    assert memory["log_law"].shape == (6,)
    assert gradient(out_of(method, network, data, memory).loss, *network.parameters()).abs().max() > 0


# -- what the law comes from ---------------------------------------------------------------------------------


def test_several_references_have_the_mean_of_their_laws():
    data, networks, method = world(), [linear(1), linear(2), linear(3)], FactorConsistency()
    laws = torch.stack([method.measure(n, *data).exp() for n in networks])
    close(method.initial_memory(data, networks)["log_law"].exp(), laws.mean(0), 1e-13)


def test_a_law_can_be_stated():
    memory = FactorConsistency(law=(3.0, 1.0, 0.0, 0.0, 0.0)).initial_memory(world(), None)
    law = memory["log_law"].exp()
    close(law[:2], torch.tensor([0.75, 0.25]), 1e-6)
    assert (law[2:] > 0).all()


def test_without_a_law_or_a_reference_it_says_what_is_missing():
    with pytest.raises(ValueError, match=r"name one, or write law=\(...\)"):
        FactorConsistency().initial_memory(world(), None)


def test_a_network_is_measured_without_dropout_and_left_as_it_was():
    data = world()
    network = nn.Sequential(nn.Dropout(0.5), linear()).train()
    method = FactorConsistency()
    close(method.measure(network, *data), method.measure(linear(), *data), 1e-13)
    assert network.training


# -- Kendall -------------------------------------------------------------------------------------------------


def test_the_rank_agreement_is_scipys():
    generator = torch.Generator().manual_seed(0)
    for ties in (False, True):
        a, b = torch.randn(2, 30, generator=generator, dtype=torch.float64)
        a, b = (a.round(), b.round()) if ties else (a, b)
        close(kendall(a, b), torch.tensor(kendalltau(a.numpy(), b.numpy()).statistic), 1e-12)


def test_one_law_agrees_with_itself_and_not_with_its_reverse():
    a = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert kendall(a, a) == 1 and kendall(a, a.flip(0)) == -1
    assert kendall(a, torch.ones(4)) == 0


# -- extremes ------------------------------------------------------------------------------------------------


@each_divergence
def test_a_network_that_ignores_its_inputs_has_a_uniform_law_and_no_nan(divergence):
    data, network = world(), linear()
    nn.init.zeros_(network.weight)
    method = FactorConsistency(divergence)
    memory = method.initial_memory(data, linear(1))
    out = out_of(method, network, data, memory)
    assert out.loss.isfinite() and gradient(out.loss, *network.parameters()).isfinite().all()
    close(
        method.measure(network, *data), torch.full((FACTORS,), -math.log(FACTORS), dtype=torch.float64), 1e-12
    )


@pytest.mark.parametrize("scale", [1e4, 1e-4])
@each_divergence
def test_large_and_small_inputs_give_finite_values_and_gradients(divergence, scale):
    data = Data(scale * world().inputs.float(), world().labels)
    data.inputs[:, 0] = 0.0  # a factor that is always 0, as the corners of digits
    network, method = curved().float(), FactorConsistency(divergence)
    memory = method.initial_memory(data, curved(1).float())
    out = out_of(method, network, data, memory)
    assert out.loss.isfinite() and gradient(out.loss, *network.parameters()).isfinite().all()


def test_a_loss_that_is_only_looked_at_has_its_value_too():
    data, network, method = world(), curved(), FactorConsistency()
    memory = method.initial_memory(data, curved(1))
    with torch.no_grad():
        looked = out_of(method, network, data, memory).loss
    assert looked == out_of(method, network, data, memory).loss


def test_no_example_costs_nothing():
    empty = Data(torch.zeros(0, FACTORS, dtype=torch.float64), torch.zeros(0, dtype=torch.long))
    memory = FactorConsistency().initial_memory(world(), linear())
    assert out_of(FactorConsistency(), linear(), empty, memory).loss == 0


# -- refusals ------------------------------------------------------------------------------------------------


def test_a_part_of_the_batch_is_refused():
    data, network = world(), linear()
    memory = FactorConsistency().initial_memory(data, network)
    with pytest.raises(ValueError, match="got 12 examples of 24; leave micro_batch out"):
        FactorConsistency()(**data._asdict(), network=network, memory=memory, count=24.0)
    assert FactorConsistency.unit == "batch"


def test_a_law_of_other_factors_is_refused():
    with pytest.raises(ValueError, match="the law has 2 factors and an input 5"):
        out_of(FactorConsistency(), linear(), world(), {"log_law": log_normalised(torch.ones(2), 0.0)})


def test_wrong_settings_are_refused():
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="weight is finite and >= 0"):
            FactorConsistency(weight=weight)
    for floor in (0.0, math.inf):
        with pytest.raises(ValueError, match="floor is finite and > 0"):
            FactorConsistency(floor=floor)
    for law in ((-1.0, 2.0), (0.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="law is finite, >= 0 and somewhere > 0"):
            FactorConsistency(law=law)
    with pytest.raises(TypeError):
        FactorConsistency("KL")  # type: ignore[arg-type]


def test_the_object_is_its_recipe_and_keeps_the_contract():
    method = FactorConsistency(fdiv.JS(0.3), weight=0.2, law=(0.5, 0.5))
    assert fdiv.parse(repr(method), ["fdiv.methods.represent.factor_consistency"]) == method
    assert isinstance(method, Method) and FactorConsistency().divergence == fdiv.KL()
