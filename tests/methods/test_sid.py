"""SiD and SIM: which divergence's gradient each alpha is, in closed form, and what a step trains."""

import math

import pytest
import torch
from tests.methods.one_step import F64, gradients, line, networks, on_a_grid, student, teacher
from tests.worlds import close, gradient

from fdiv import KL, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.generate._critic import Critic, Known
from fdiv.methods.generate.levels import Karras, LogNormal
from fdiv.methods.generate.sid import SiD, identity
from fdiv.methods.generate.sim import SIM, distance_slope


def on_the_line(sigma, held):
    """E_q|D_q - D_p|^2 by quadrature; held: with q's samples where they are."""
    q, p = student(0.3, 1.05), teacher((-0.5, 0.9, 0.4), (0.5, 1.0, 0.6))
    x, step = line()
    mass = q.log_prob(x, sigma).exp()
    level = torch.tensor(sigma, dtype=F64)
    apart = (q.denoise(x, level) - p(x, level)).squeeze(1)
    made, seen, weight = on_a_grid(q, p, sigma, points=96, through=True)
    expected = ((mass.detach() if held else mass) * apart.square()).sum() * step
    return q, made, seen, weight.unsqueeze(1), gradient(expected, q.mean, q.log_scale)


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_alpha_one_half_is_half_the_gradient_of_the_squared_difference(sigma):
    q, made, seen, weight, expected = on_the_line(sigma, held=False)
    loss = (weight * identity(0.5, made, seen.student, seen.teacher)).sum()
    close(2 * gradient(loss, q.mean, q.log_scale), expected, 1e-5)


@pytest.mark.parametrize("sigma", [0.7, 1.5])
def test_alpha_one_is_half_of_it_with_the_samples_held_and_that_is_sim(sigma):
    q, made, seen, weight, expected = on_the_line(sigma, held=True)
    loss = (weight * identity(1.0, made, seen.student, seen.teacher)).sum()
    close(2 * gradient(loss, q.mean, q.log_scale), expected, 1e-5)
    slope = distance_slope(seen.student - seen.teacher, None)
    loss = -(weight * slope * (seen.student - made)).sum()
    close(gradient(loss, q.mean, q.log_scale), expected, 1e-5)


def test_sim_under_a_huber_distance_is_the_gradient_with_the_samples_held():
    q, p, c = student(0.3, 1.05), teacher((-0.5, 0.9, 0.4), (0.5, 1.0, 0.6)), 0.3
    x, step = line()
    level = torch.tensor(0.7, dtype=F64)
    apart = (q.denoise(x, level) - p(x, level)).squeeze(1)
    held = (q.log_prob(x, 0.7).exp().detach() * ((apart.square() + c**2).sqrt() - c)).sum() * step
    made, seen, weight = on_a_grid(q, p, 0.7, points=96, through=True)
    slope = distance_slope(seen.student - seen.teacher, c)
    loss = -(weight.unsqueeze(1) * slope * (seen.student - made)).sum()
    close(gradient(loss, q.mean, q.log_scale), gradient(held, q.mean, q.log_scale), 1e-5)


def test_the_slope_of_the_huber_distance_is_bounded_and_that_of_all_coordinates():
    y = torch.tensor([[3e4, -4e4], [0.0, 0.0], [0.3, 0.4]], dtype=F64, requires_grad=True)
    distance = (y.square().sum(1) + 0.5**2).sqrt() - 0.5
    close(distance_slope(y, 0.5).flatten(), gradient(distance.sum(), y))
    assert (distance_slope(y, 0.5).norm(dim=1) <= 1).all()


@pytest.mark.parametrize(
    ("method", "factor"), [(SiD(alpha=1.0, critic=Critic()), 2.0), (SIM(critic=Critic()), 1.0)], ids=repr
)
def test_a_step_is_the_loss_at_its_draws_over_the_distance(method, factor):
    # Of SiD with alpha 1 twice that loss is SIM's, draw by draw.
    q, p = networks()
    module = method.beside(q, p).double()
    for weight in module.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    inputs = torch.zeros(6, 2, dtype=F64)
    torch.manual_seed(3)
    given = {"inputs": inputs, "labels": inputs, "p_network": p, "module": module}
    whole = method(network=q, step=0, **given).loss
    torch.manual_seed(3)
    critics = type(method)(every=2, critic=Critic())(network=q, step=0, **given).loss
    own = torch.autograd.grad(factor * (whole - critics), list(q.parameters()))

    torch.manual_seed(3)
    made = q(2.5 * torch.randn_like(inputs), 2.5)
    torch.rand(6, dtype=F64), torch.randn_like(inputs)  # the fake score's
    rank = torch.rand(6, dtype=F64) * (1 - 2**-50) + 2**-51
    sigma = Karras(most=24.4).quantile(rank).unsqueeze(1)
    x = made + sigma * torch.randn_like(made)
    level = sigma.squeeze(1)
    fake, truth = Critic().denoiser(module, q)(x, level), p(x, level)
    apart = truth - fake
    scale = 1 / (made - truth).abs().mean(1, keepdim=True).detach()
    expected = 2 * (scale * apart * ((truth - made) - apart)).mean()
    for a, b in zip(own, torch.autograd.grad(expected, list(q.parameters())), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("method", [SiD(), SIM(), SIM(huber=0.1)], ids=repr)
def test_a_step_trains_student_and_fake_score_and_nobody_else(method):
    q, p = networks(classes=3)
    module = method.beside(q, p).double()
    assert isinstance(method, Method) and method.divergence == ReverseKL()
    assert module.discriminator is None
    for weight in module.parameters():  # the fake score starts as the teacher, which teaches nothing
        weight.data += 0.1 * torch.randn_like(weight)
    torch.manual_seed(0)
    inputs, labels = torch.randn(8, 2, dtype=F64), torch.arange(8) % 3
    out = method(inputs=inputs, labels=labels, network=q, p_network=p, module=module, step=0)
    out.loss.backward()
    assert all(g is not None and g.isfinite().all() for g in (*gradients(q), *gradients(module)))
    assert all(g is None for g in gradients(p))
    assert out.metrics.keys() == {"fake_score_loss", "score_gap"} and out.metrics["score_gap"] > 0
    noise = torch.randn(4, 2, dtype=F64)
    close(method.sample(q, noise, labels[:4]), q(2.5 * noise, 2.5, labels[:4]))


@pytest.mark.parametrize("method", [SiD(), SIM()], ids=repr)
def test_it_is_data_free(method):
    q, p = networks()
    module = method.beside(q, p).double()
    found = []
    for inputs in (torch.zeros(6, 2, dtype=F64), 100 * torch.randn(6, 2, dtype=F64)):
        torch.manual_seed(1)
        found.append(method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0).loss)
    assert found[0] == found[1]


def test_a_gaussian_is_found_from_afar_by_every_alpha():
    # Exact scores; alpha above 1/2 is another vector field, with the same zero.
    for alpha in (0.5, 1.0, 1.2):
        q, p = student(1.5, 0.4), teacher((-0.5, 0.8, 1.0))
        optimizer = torch.optim.Adam(q.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, 120)
        for _ in range(120):
            made, seen, weight = on_a_grid(q, p, 0.8, points=12, through=True)
            optimizer.zero_grad()
            (weight.unsqueeze(1) * identity(alpha, made, seen.student, seen.teacher)).sum().backward()
            optimizer.step()
            schedule.step()
        assert q.mean.item() == pytest.approx(-0.5, abs=0.02)
        assert q.log_scale.exp().item() == pytest.approx(0.8, abs=0.05)


def test_laws_that_are_known_need_no_critic():
    q, p = student(1.5, 0.4), teacher((-0.5, 0.8, 1.0))
    method = SiD(critic=Known(), levels=LogNormal(0.0, 0.3))
    inputs = torch.zeros(64, 1, dtype=F64)
    module = method.beside(q, p)
    assert not list(module.parameters())
    out = method(inputs=inputs, labels=inputs, network=q, p_network=p, module=module, step=0)
    out.loss.backward()
    assert q.mean.grad.item() > 0  # -0.5 is below 1.5


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SiD(alpha=-0.1), "alpha"),
        (lambda: SiD(alpha=math.nan), "alpha"),
        (lambda: SiD(weight="none"), "weight"),
        (lambda: SiD(sigma_init=math.inf), "sigma_init"),
        (lambda: SIM(huber=0.0), "huber"),
        (lambda: SIM(every=0), "every"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_their_divergence_is_fixed():
    with pytest.raises(TypeError):
        SiD(divergence=KL())  # type: ignore[call-arg]
