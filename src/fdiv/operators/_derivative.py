"""The derivatives of f_softargmax, backward and forward, by the implicit function theorem."""

import torch
from torch import Tensor

from fdiv.operators._curves import Curves
from fdiv.operators._solver import flat_rise


class ImplicitGradient(torch.autograd.Function):
    """x [rows, atoms], with dx = w (dtheta - dphi - dtau) + x dlog q, where dtau keeps the sum.

    w_j = q_j / f''(u_j) is how fast theta_j - tau moves x_j, so that dx/dtheta = diag(w) - w w' / sum w; dphi
    is how f'(u_j) moves with the parameters of make(*parameters).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, log_q: Tensor, x: Tensor, make, *parameters: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, log_q, _, ctx.make, *parameters = inputs
        ctx.save_for_backward(log_q, output, *parameters)
        ctx.save_for_forward(log_q, output, *parameters)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, x, *parameters = ctx.saved_tensors
        w, share = _speed_and_share(ctx)
        in_theta = _pushed(grad, w, share)
        in_log_q = x * (grad - (share * grad).sum(-1, keepdim=True)) if ctx.needs_input_grad[1] else None
        in_parameters = [
            -(in_theta * _moved_by(ctx, i)).sum().reshape(p.shape).to(p.dtype)
            if ctx.needs_input_grad[4 + i]
            else None
            for i, p in enumerate(parameters)
        ]
        return in_theta, in_log_q, None, None, *in_parameters

    @staticmethod
    def jvp(ctx, in_theta, in_log_q, _x, _make, *in_parameters):
        _, x, *_ = ctx.saved_tensors
        w, share = _speed_and_share(ctx)
        along = torch.zeros_like(x) if in_theta is None else in_theta
        for i, move in enumerate(in_parameters):
            if move is not None:
                along = along - _moved_by(ctx, i) * move.reshape(()).to(x.dtype)
        result = _pushed(along, w, share)
        if in_log_q is None:
            return result
        flow = torch.where(x > 0, x * in_log_q, 0.0)
        return result + flow - share * flow.sum(-1, keepdim=True)


def _pushed(along: Tensor, w: Tensor, share: Tensor) -> Tensor:
    """(diag(w) - w w' / sum w) times `along`, a symmetric matrix."""
    # Seen from the fastest atom: its w may exceed all others by so much that a mean would cancel.
    along = along - along.gather(-1, w.argmax(-1, keepdim=True))
    flow = torch.where(w > 0, w * along, 0.0)
    return flow - share * flow.sum(-1, keepdim=True)


def _speed_and_share(ctx) -> tuple[Tensor, Tensor]:
    """(w, w / sum w), w = q / f''(u) = x / (u f''(u)); 0 where x stays as it is. Differentiable."""
    log_q, x, *parameters = ctx.saved_tensors
    curves, log_ratio = Curves(ctx.make, tuple(parameters)), _log_ratio(x, log_q)
    rise = curves.rise(log_ratio)  # u f''(u) = curvature(u) / u
    moves = (x > 0) & ((log_ratio > 0) | (rise > flat_rise(curves.member, x.dtype)))
    # Where u f''(u) underflows, an atom all but alone on its row, only that w is huge has an effect.
    w = torch.where(moves, x / rise.clamp(min=torch.finfo(x.dtype).eps ** 2), 0.0)
    return w, w / w.sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)


def _moved_by(ctx, which: int) -> Tensor:
    """How f'(u) of each atom moves with a parameter."""
    log_q, x, *parameters = ctx.saved_tensors
    return Curves(ctx.make, tuple(parameters)).phi_in(which, _log_ratio(x, log_q))


def _log_ratio(x: Tensor, log_q: Tensor) -> Tensor:
    """log(x/q), 0 where x = 0."""
    held = x > 0
    return torch.where(held, x, 1.0).log() - torch.where(held, log_q, 0.0)
