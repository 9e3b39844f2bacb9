"""Classifier-free guidance: of samples, and of the teacher of every one-step student."""

from dataclasses import replace

import pytest
import torch
from tests.worlds import close, gradient

from fdiv.diffusion.edm import guided, heun, karras
from fdiv.divergences.js import JS
from fdiv.methods.generate.denoising import Denoising
from fdiv.methods.generate.f_distill import FDistill
from fdiv.methods.generate.rcm import RCM
from fdiv.methods.generate.sid import SiD
from fdiv.methods.generate.sim import SIM
from fdiv.methods.generate.uni_instruct import UniInstruct
from fdiv.networks.denoiser import Denoiser

F64, LABELS = torch.float64, torch.tensor([0, 1, 2, 0, 1])
STUDENTS = [
    FDistill(JS(0.5), every=1),
    FDistill.dmd(0.5),
    UniInstruct(),
    SiD(),
    SIM(),
    RCM(warmup=0, every=1, sigma_init=2.5),
    RCM(warmup=0, dmd=0.0),
]


def network(seed=0, **fields):
    torch.manual_seed(seed)
    made = Denoiser(width=16, blocks=1, **({"classes": 3, "null": True} | fields))
    built = made.build(torch.Size([2]), 2).double()
    for weight in built.parameters():
        weight.data += 0.2 * torch.randn_like(weight)
    return built


class Guided(torch.nn.Module):
    """The same said by a network of its own."""

    def __init__(self, inner, guidance):
        super().__init__()
        self.inner, self.guidance, self.conditional, self.width = inner, guidance, True, inner.width
        self.features = inner.features

    def forward(self, x, sigma, condition):
        free = self.inner(x, sigma, torch.full_like(condition, 3))
        return self.guidance * self.inner(x, sigma, condition) + (1 - self.guidance) * free


def test_guidance_goes_on_from_no_condition_through_the_condition():
    told, x, sigma = network(), torch.randn(5, 2, dtype=F64), torch.full((5,), 0.7, dtype=F64)
    for guidance in (0.0, 0.5, 1.0, 3.0):
        close(guided(told, guidance)(x, sigma, LABELS), Guided(told, guidance)(x, sigma, LABELS), 1e-12)
    assert guided(told, 1.0) is told  # without a second call
    free = guided(told, 0.0)
    close(free(x, sigma, LABELS), free(x, sigma, LABELS.roll(1)))
    noise = torch.randn(5, 2, dtype=F64)
    expected = heun(Guided(told, 3.0), 80 * noise, karras(4), LABELS)
    close(Denoising(steps=4, guidance=3.0).sample(told, noise, LABELS), expected, 1e-10)


@pytest.mark.parametrize("method", STUDENTS, ids=repr)
def test_a_students_teacher_is_guided(method):
    """A student of a guided teacher is that of a network which says what the guided one says."""
    student, teacher = network(1), network(2)
    torch.manual_seed(0)
    module, inputs = method.beside(student, teacher).double(), torch.randn(5, 2, dtype=F64)

    def found(method, teacher):
        torch.manual_seed(3)
        out = method(inputs=inputs, labels=LABELS, network=student, p_network=teacher, module=module, step=0)
        each = torch.autograd.grad(out.loss, list(student.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in each if g is not None])

    ours = found(replace(method, guidance=2.5), teacher)
    close(ours, found(method, Guided(teacher, 2.5)), 1e-9)
    assert (ours - found(method, teacher)).abs().max() > 1e-6


def test_what_no_condition_means_is_learnt_by_leaving_it_out():
    told, inputs, seen = network(), torch.zeros(3000, 2, dtype=F64), []

    class Recording(torch.nn.Module):
        conditional, null = True, 3

        def forward(self, x, sigma, condition):
            seen.append(condition)
            return told(x, sigma, condition)

    labels = torch.arange(3000) % 3
    for drop in (0.0, 0.2):
        torch.manual_seed(0)
        Denoising(drop=drop)(inputs=inputs, labels=labels, network=Recording())
        assert (seen[-1] == 3).double().mean().item() == pytest.approx(drop, abs=0.03)
        assert (seen[-1] == labels)[seen[-1] != 3].all()
    loss = Denoising(drop=0.2)(inputs=inputs, labels=labels, network=told).loss
    assert gradient(loss, told.condition.weight).reshape(4, -1)[3].abs().sum() > 0


def test_guidance_of_what_was_not_learnt_is_refused():
    plain, x = network(null=False), torch.randn(5, 2, dtype=F64)
    with pytest.raises(ValueError, match=r"Denoising\(drop=0.1\)"):
        Denoising(guidance=2.0).sample(plain, x, LABELS)
    with pytest.raises(ValueError, match=r"null=True"):
        Denoising(drop=0.1)(inputs=x, labels=LABELS, network=plain)
    with pytest.raises(ValueError, match=r"null=True"):
        Denoising(drop=0.1)(inputs=x, labels=LABELS, network=network(classes=0, null=False))
    method = SiD(guidance=2.0)
    networks = {"network": plain, "p_network": plain, "module": method.beside(plain, plain)}
    with pytest.raises(ValueError, match="guidance=2"):
        method(inputs=x, labels=LABELS, step=0, **networks)
    for wrong in (lambda: Denoiser(null=True), lambda: Denoising(drop=1.0), lambda: SiD(guidance=-1.0),
                  lambda: RCM(guidance=float("nan")), lambda: Denoising(guidance=-0.5)):  # fmt: skip
        with pytest.raises(ValueError, match=r"null|drop|guidance"):
            wrong()
