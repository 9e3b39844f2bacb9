"""NCE, MECO and f-EBM: flat landscapes, exact gradients by enumeration, and the pairs of every divergence."""

import math

import pytest
import torch
from tests.worlds import close, each_other_object, each_smooth_divergence, gradient
from torch import nn
from torch.nn.functional import softplus

from fdiv import JS, KL, TV, Neyman, Pearson, ReverseKL, SquaredHellinger
from fdiv.methods._method import READABLE_IN_EXAMPLES, Adaptive, Method
from fdiv.methods.energy import _noise
from fdiv.methods.energy.f_ebm import FEBM, Critic, jumped, langevin
from fdiv.methods.energy.meco import MECO, log_less
from fdiv.methods.energy.nce import NCE
from fdiv.networks.energy import EnergyMLP
from fdiv.tasks.labelled import Labelled

DATA = Labelled(
    torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) @ torch.tensor([[2.0, 0.5], [0.0, 1.0]]),
    torch.zeros(64),
)


class Mean(nn.Module):
    """E of N(mean, 1), with its constant, plus `shift`."""

    def __init__(self, mean: float, shift: float = 0.0):
        super().__init__()
        self.mean, self.shift = nn.Parameter(torch.tensor(mean, dtype=torch.float64)), shift

    def forward(self, x):
        return (x - self.mean).square() / 2 + math.log(2 * math.pi) / 2 + self.shift


def normal(mean, deviation=1.0, count=200_001):
    """Evenly spread draws of a normal law, [count, 1]."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.distributions.Normal(mean, deviation).icdf(levels).unsqueeze(-1)


def drawn_evenly(monkeypatch, mean=0.0, deviation=1.0):
    monkeypatch.setattr(_noise, "drawn", lambda memory, count, like: normal(mean, deviation, count))


@pytest.mark.parametrize("method", [NCE(), MECO(), FEBM()], ids=repr)
def test_each_is_a_method_and_reads_what_the_table_names(method):
    assert isinstance(method, Method) and isinstance(method, NCE | MECO | FEBM)
    names = {name for names in READABLE_IN_EXAMPLES for name in names.split(", ")}
    assert set(method.reads) <= names
    assert isinstance(method, Adaptive) == isinstance(method, MECO)


# -- noise --------------------------------------------------------------------------------------------------


def test_noise_is_fitted_to_the_data_and_wider():
    tables = _noise.fitted(DATA.inputs, None, 1.5)
    covariance = tables["noise_factor"] @ tables["noise_factor"].T
    close(covariance, 1.5**2 * DATA.inputs.T.cov(), 1e-5)
    close(tables["noise_mean"], DATA.inputs.mean(0), 1e-5)
    law = torch.distributions.MultivariateNormal(tables["noise_mean"], covariance)
    close(_noise.log_density(tables, DATA.inputs).float(), law.log_prob(DATA.inputs), 1e-5)
    torch.manual_seed(0)
    close(_noise.drawn(tables, 20_000, DATA.inputs).T.cov(), covariance, 0.05)
    fixed = _noise.fitted(DATA.inputs, (1.0, 4.0), 1.5)
    close(
        _noise.log_density(fixed, torch.ones(1, 2)),
        torch.tensor([-math.log(2 * math.pi * 16)]).double(),
        1e-6,
    )


def test_degenerate_data_are_refused():
    with pytest.raises(ValueError, match="not fitted"):
        _noise.fitted(DATA.inputs[:2], None, 1.0)
    with pytest.raises(ValueError, match="every direction"):
        _noise.fitted(torch.arange(8.0).reshape(8, 1).expand(8, 2), None, 1.0)


# -- NCE ----------------------------------------------------------------------------------------------------


def nce_slope(tau, ratio=1, count=200_001):
    """Of data N(6, 1), noise N(0, 1) and a normalised model N(tau, 1)."""
    method, network = NCE(ratio=ratio, noise=(0.0, 1.0)), Mean(tau)
    tables = method.initial_memory(Labelled(normal(6.0, count=5), torch.zeros(5)))
    out = method(inputs=normal(6.0, count=count), network=network, memory=tables)
    return gradient(out.loss, network.mean).abs().item()


@pytest.mark.parametrize(("tau", "expected"), [(5.0, 0.022), (3.0, 0.15)])
def test_far_from_its_noise_nce_is_flat(monkeypatch, tau, expected):
    """Where that of the likelihood is 6 - tau."""
    drawn_evenly(monkeypatch)
    assert nce_slope(tau) == pytest.approx(expected, abs=0.005 if tau == 3 else 0.0005)


def test_at_the_data_nce_has_no_gradient_and_its_loss_is_that_of_the_densities(monkeypatch):
    drawn_evenly(monkeypatch, 0.5, 2.0)
    method, network = NCE(ratio=1, noise=(0.5, 2.0)), Mean(1.0)
    data = normal(1.0)
    tables = method.initial_memory(Labelled(data, torch.zeros(1)))
    loss = method(inputs=data, network=network, memory=tables).loss
    assert gradient(loss, network.mean).abs() < 1e-4

    def logit(x):
        noise = torch.distributions.Normal(0.5, 2.0)
        return torch.distributions.Normal(1.0, 1.0).log_prob(x) - noise.log_prob(x)

    close(loss, softplus(-logit(data)).mean() + softplus(logit(normal(0.5, 2.0))).mean(), 1e-6)


def test_many_noise_samples_make_it_maximum_likelihood(monkeypatch):
    drawn_evenly(monkeypatch, 0.0, 2.0)
    method, network, data = NCE(ratio=400, noise=(0.0, 2.0)), Mean(0.3), normal(1.0, count=501)
    tables = method.initial_memory(Labelled(data, torch.zeros(1)))
    slope = gradient(method(inputs=data, network=network, memory=tables).loss, network.mean)
    close(slope, torch.tensor([0.3 - 1.0]).double(), 0.02)


# -- MECO ---------------------------------------------------------------------------------------------------


def meco(method, network, data, state, memory=None):
    tables = method.initial_memory(Labelled(normal(0.0, count=5), torch.zeros(5))) | (memory or {})
    return method(inputs=data, network=network, memory=tables, state={"log u": state})


class Free(Mean):
    """The same, its constant to be learnt."""

    def __init__(self, mean: float, shift: float):
        super().__init__(mean)
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))


@pytest.mark.parametrize("shift", [0.0, -500.0])
def test_with_the_exact_normaliser_mecos_gradient_is_that_of_the_likelihood_in_the_mean(shift):
    """Over many draws of a few noise samples; log Z = -shift, and a u twice as large is another gradient."""
    network, data = Free(2.0, shift), normal(6.0, count=101)
    method = MECO(samples=16, noise=(2.5, 2.0), beta=1e-9, estimator="average")
    torch.manual_seed(0)
    for log_u, expected in ((-shift, (-4.0, 0.0)), (math.log(2) - shift, (-4.0, 0.5))):
        losses = [meco(method, network, data, log_u).loss for _ in range(800)]
        slopes = torch.stack([gradient(loss, network.mean, network.shift) for loss in losses])
        error = slopes.std(0) / math.sqrt(800)
        assert (error < 0.02).all()
        assert ((slopes.mean(0) - torch.tensor(expected)).abs() < 4 * error).all()


def test_mecos_value_is_the_likelihood_at_u(monkeypatch):
    drawn_evenly(monkeypatch, 0.0, 4.0)
    network, data = Mean(2.0, 1.0), normal(6.0)
    out = meco(MECO(samples=100_001, noise=(0.0, 4.0)), network, data, math.nan)
    exact = -torch.distributions.Normal(2.0, 1.0).log_prob(data).mean()
    close(out.loss, exact, 1e-4)
    close(out.metrics["log u"], torch.tensor(-1.0).double(), 1e-4)
    close(gradient(out.loss, network.mean), torch.tensor([2.0 - 6.0]).double(), 1e-3)


def test_the_moving_average_and_storm_are_their_formulas(monkeypatch):
    drawn_evenly(monkeypatch, 0.0, 3.0)
    network, before, data, beta, u = Free(0.4, -1.0), Free(0.1, -0.5), normal(0.0, count=9), 0.3, 2.2
    method = MECO(samples=11, noise=(0.0, 3.0), beta=beta)
    noise = normal(0.0, 3.0, 11)
    density = torch.distributions.Normal(0.0, 3.0).log_prob(noise).exp()
    now, then = ((-n(noise)).exp().div(density).mean() for n in (network, before))
    first = meco(method, network, data, math.log(u)).metrics["log u"]
    close(first.exp(), (1 - beta) * u + beta * now, 1e-6)
    remembered = {f"before.{name}": p.detach() for name, p in before.named_parameters()}
    storm = meco(method, network, data, math.log(u), remembered).metrics["log u"]
    close(storm.exp(), (1 - beta) * (u + now - then) + beta * now, 1e-6)
    heavier = remembered | {"before.shift": torch.tensor(-50.0).double()}
    floor = meco(method, network, data, math.log(u), heavier).metrics["log u"]
    close(floor.exp(), beta * now, 1e-6)  # the difference alone would be negative
    average = MECO(samples=11, noise=(0.0, 3.0), beta=beta, estimator="average")
    close(meco(average, network, data, math.log(u), remembered).metrics["log u"], first, 1e-9)


def test_differences_are_taken_in_logarithms():
    one, two = torch.tensor([800.0, 799.0], dtype=torch.float64)
    assert log_less(two, one) == log_less(one, one) == -math.inf
    close(log_less(one, two), two + math.log(math.e - 1), 1e-12)


def test_after_a_step_meco_remembers_the_weights_of_both_ends():
    network, memory, method = Mean(0.1), {}, MECO()
    method.remember(memory, network=network)
    assert memory.keys() == {"now.mean"}
    with torch.no_grad():
        network.mean.fill_(0.7)
    method.remember(memory, network=network)
    assert memory["before.mean"] == 0.1 and memory["now.mean"] == 0.7
    MECO(estimator="average").remember(empty := {}, network=network)
    assert not empty and method.advance({}, {"log u": 2.0}, 0.5) == {"log u": 2.0}
    assert math.isnan(method.initial_state()["log u"])


# -- f-EBM --------------------------------------------------------------------------------------------------

P = torch.tensor([30, 24, 18, 14, 9, 5])  # hundredths: draws that are the law itself
Q = torch.tensor([5, 15, 25, 25, 20, 10])
LOG_P, LOG_Q = (counts.double().div(100).log() for counts in (P, Q))


def febm(divergence, energy, critic, clip=None):
    p, q = (torch.arange(6).repeat_interleave(counts) for counts in (P, Q))
    return FEBM(divergence, clip=clip).minimax(energy[p], critic[p], energy[q], critic[q])


@each_smooth_divergence
def test_at_the_best_critic_the_energy_gets_the_gradient_of_the_divergence(divergence):
    """Exactly, but for the n - 1 of the covariance; Z is whatever it is."""
    energy = (-LOG_Q + 1.7).requires_grad_()
    critic = (LOG_P - 1.7).requires_grad_()  # log p + log Z
    out = febm(divergence, energy, critic)
    exact = divergence(LOG_P, (-energy).log_softmax(-1))
    close(out.loss.detach(), exact.detach(), 1e-9)
    price = -divergence.psi(LOG_P - LOG_Q)
    covariance = LOG_Q.exp() * (price - (LOG_Q.exp() * price).sum())  # of F and each energy, over n
    close(gradient(out.loss, energy) - covariance / 99, gradient(exact, energy), 1e-9)
    close(gradient(out.loss, critic), torch.zeros(6).double(), 1e-9)  # and the critic has none


@each_smooth_divergence
def test_any_other_critic_says_less(divergence):
    energy = -LOG_Q
    best = febm(divergence, energy, LOG_P).metrics["divergence"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        critic = LOG_P + 0.5 * torch.randn(6, generator=generator, dtype=torch.float64)
        assert febm(divergence, energy, critic).metrics["divergence"] < best


@each_smooth_divergence
def test_the_critic_ascends(divergence):
    critic = (LOG_P + 0.3 * torch.arange(6).double()).requires_grad_()
    energy = (-LOG_Q).requires_grad_()
    before = febm(divergence, energy, critic)
    step = gradient(before.loss, critic)
    after = febm(divergence, energy, critic - 1e-4 * step / step.norm())
    assert after.metrics["divergence"] > before.metrics["divergence"]


def test_beyond_the_clip_functions_go_on_linearly():
    method, x = FEBM(KL(), clip=2.0), torch.tensor([-7.0, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    price = method._price(x)
    e2 = math.exp(2.0)
    close(price, torch.tensor([math.exp(-2) * (1 - 5) - 1, math.e - 1, e2 * (1 + 3) - 1]).double(), 1e-6)
    close(gradient(price.sum(), x), torch.tensor([math.exp(-2), math.e, e2]).double(), 1e-6)


X = torch.linspace(-3, 3, 25, dtype=torch.float64)
PAIRS = [
    (KL(), 1 + X, X.exp()),
    (ReverseKL(), -(-X).exp(), X - 1),
    (2 * JS(0.5), math.log(2) + X - softplus(X), softplus(X) - math.log(2)),
    (2 * SquaredHellinger(), 1 - (-X / 2).exp(), (X / 2).exp() - 1),
    (Pearson(), 2 * X.exp() - 2, (2 * X).exp() - 1),
    (Neyman(), 1 - (-2 * X).exp(), 2 - 2 * (-X).exp()),
]


@pytest.mark.parametrize(
    ("divergence", "slope", "price"), PAIRS, ids=lambda v: repr(v) if not isinstance(v, torch.Tensor) else ""
)
def test_the_pairs_of_the_paper_are_phi_and_minus_psi_up_to_one_constant(divergence, slope, price):
    constant = slope - divergence.phi(X)
    close(constant, constant[:1].expand_as(X), 1e-9)
    close(price + divergence.psi(X), constant, 1e-9)


def test_a_critic_starts_apart_from_the_model():
    network = EnergyMLP(width=8).build(torch.Size([2]), 1)
    critic = Critic(network)
    close(critic(DATA.inputs), -DATA.inputs.square().sum(-1).double() / 18, 1e-6)
    assert all(p.requires_grad for p in critic.parameters())


def test_chains_keep_to_the_model():
    """N(2, 1): by jumps exactly, by Langevin steps up to their size (variance 1/(1 - step/4))."""
    network, tables = Mean(2.0), _noise.fitted(normal(0.0, count=64), (0.0, 3.0), 1.0)
    torch.manual_seed(0)
    exact = 2 + torch.randn(40_000, 1).double()
    everybody = torch.ones(len(exact), dtype=torch.bool)
    far = torch.full_like(exact, -4.0)
    for _ in range(60):
        far = jumped(network, tables, far, everybody)
    moved = langevin(network, exact, 30, 0.4)
    for chains, variance in ((jumped(network, tables, exact, everybody), 1.0), (far, 1.0), (moved, 1 / 0.9)):
        assert chains.mean().item() == pytest.approx(2.0, abs=0.03)
        assert chains.var().item() == pytest.approx(variance, abs=0.04)
    assert torch.equal(jumped(network, tables, exact, ~everybody), exact)


def test_after_a_step_the_chains_have_moved_in_place():
    method, network = FEBM(chains=16), EnergyMLP(width=8).build(torch.Size([2]), 1)
    memory = method.initial_memory(DATA)
    chains, before = memory["chains"], memory["chains"].clone()
    with torch.no_grad():
        method.remember(memory, network=network)
    assert memory["chains"] is chains and not torch.equal(chains, before) and chains.isfinite().all()
    assert torch.equal(before, method.initial_memory(DATA)["chains"])


def test_it_trains_model_and_critic_together():
    method, network = FEBM(JS(0.5), chains=16), EnergyMLP(width=8).build(torch.Size([2]), 1)
    critic = method.beside(network)
    memory = method.initial_memory(DATA)
    alone = method(inputs=DATA.inputs, network=network, module=critic, memory=memory, step=0)
    alone.loss.backward()
    assert all(p.grad is None for p in network.parameters())  # a step of the critic
    out = method(inputs=DATA.inputs, network=network, module=critic, memory=memory, step=3)
    assert out.loss == alone.loss
    out.loss.backward()
    grads = [p.grad for side in (network, critic.energy) for p in side.head.parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)


# -- edges --------------------------------------------------------------------------------------------------


@each_smooth_divergence
def test_extreme_ratios_are_finite(divergence):
    energy = torch.tensor([1e4, -1e4, 0.0, 5.0, -5.0, 1.0], dtype=torch.float64, requires_grad=True)
    critic = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    out = febm(divergence, energy, critic, clip=5.0)
    assert out.loss.isfinite() and gradient(out.loss, energy, critic).isfinite().all()


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_extreme_energies_are_finite(shift):
    data = normal(0.0, count=9)
    for method in (NCE(noise=(0.0, 2.0)), MECO(noise=(0.0, 2.0))):
        network = Mean(0.5, shift)
        tables = method.initial_memory(Labelled(data, torch.zeros(9)))
        for before in (math.nan, 0.0, 1e4, -1e4):
            given = {"inputs": data, "network": network, "memory": tables}
            if isinstance(method, MECO):
                given["state"] = {"log u": before}
            out = method(**given)
            assert out.loss.isfinite() and gradient(out.loss, network.mean).isfinite().all()


def test_empty_batches_cost_nothing_or_are_refused():
    network, none = Mean(0.5), normal(0.0, count=9)[:0]
    tables = NCE(noise=(0.0, 1.0)).initial_memory(Labelled(normal(0.0, count=9), torch.zeros(9)))
    out = NCE()(inputs=none, network=network, memory=tables, count=4)
    assert out.loss == 0 and gradient(out.loss, network.mean) == 0
    with pytest.raises(ValueError, match="empty"):
        MECO()(inputs=none, network=network, memory=tables, state={"log u": 0.0})
    with pytest.raises(ValueError, match="empty"):
        FEBM()(inputs=none, network=network, module=Critic, memory=tables)
    with pytest.raises(ValueError, match="one output"):
        _noise.energy_of(nn.Linear(2, 3), DATA.inputs)


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        (NCE, {"ratio": 0}),
        (NCE, {"widen": 0.0}),
        (NCE, {"noise": (0.0, -1.0)}),
        (MECO, {"estimator": "adam"}),
        (MECO, {"beta": 0.0}),
        (MECO, {"samples": 0}),
        (FEBM, {"clip": 0.0}),
        (FEBM, {"chains": 1}),
        (FEBM, {"steps": 0}),
        (FEBM, {"every": 0}),
        (FEBM, {"step_size": -1.0}),
        (FEBM, {"jump": 1.5}),
    ],
)
def test_wrong_fields_are_refused(method, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        method(**wrong)


@each_other_object
def test_f_ebm_takes_f_divergences_alone(other):
    with pytest.raises(TypeError, match="FEBM"):
        FEBM(other)


def test_f_ebm_refuses_a_kink():
    with pytest.raises(ValueError, match="kink"):
        FEBM(TV())
    with pytest.raises(ValueError, match="kink"):
        FEBM(0.5 * KL() + TV())


def test_an_energy_is_confined_and_is_one_number():
    network = EnergyMLP(width=8, confined=2.0).build(torch.Size([2]), 1)
    far = network(torch.tensor([[1e4, 0.0]])) / 1e8
    assert far.item() == pytest.approx(1 / 8, rel=1e-2)
    with pytest.raises(ValueError, match="one number"):
        EnergyMLP().build(torch.Size([2]), 2)
    with pytest.raises(ValueError, match="confined"):
        EnergyMLP(confined=0.0)
