"""Divergences with a parameter that is learnt."""

from collections.abc import Callable

from torch import Tensor

from fdiv._divergence import FDivergence, on_one_support, require_f_divergence
from fdiv.operators._curves import Curves


class Family:
    """make(*parameters), where the parameters are tensors with gradients: f-divergences that can be learnt.

    `f_softargmax` and `f_softmax` take one wherever they take a divergence, and are then differentiable in
    its parameters; calling it is the divergence, differentiable in them (log_p and log_q are constants). Each
    parameter is one number; make a family for each head or layer that has its own. `make` is given floats:
    `Alpha`, `JS`, or `lambda t, w: t * (KL() + w * Pearson())`.

    The derivative in a parameter is a central difference of sixth order in float64, whatever the code of the
    divergence: about 11 digits for a first derivative, 8 for a second one, and no special case at `Alpha`'s
    1 and 0.
    Errors: TypeError for a parameter that is no floating-point tensor, or a `make` that gives no
    f-divergence; ValueError for one of several numbers, or at the very edge of what `make` allows.

    >>> import torch
    >>> from fdiv import Alpha, f_softargmax
    >>> alpha = torch.tensor(1.5, requires_grad=True)
    >>> x = f_softargmax(torch.tensor([1.0, 0.5, -1.0]), Family(Alpha, alpha))
    >>> torch.autograd.grad(x[0], alpha)[0]
    tensor(0.1500)
    """

    def __init__(self, make: Callable[..., FDivergence], *parameters: Tensor):
        for parameter in parameters:
            if not (isinstance(parameter, Tensor) and parameter.is_floating_point()):
                raise TypeError(
                    f"the parameters of a Family are floating-point tensors, got {parameter!r}; for a number "
                    "that is not learnt write the divergence itself"
                )
            if parameter.numel() != 1:
                raise ValueError(
                    f"a parameter of a Family is one number, got {tuple(parameter.shape)}; make one Family "
                    "for each of them"
                )
        if not parameters:
            raise TypeError("a Family has at least one parameter; without, write the divergence itself")
        self.make, self.parameters = make, parameters
        require_f_divergence(self.member, "Family")

    @property
    def member(self) -> FDivergence:
        """The divergence at the parameters' present values."""
        return self.curves.member

    @property
    def curves(self) -> Curves:
        return Curves(self.make, self.parameters)

    def __repr__(self) -> str:
        return f"Family({self.member!r})"

    def __call__(self, log_p: Tensor, log_q: Tensor, dim: int = -1) -> Tensor:
        """D(p, q), of a reference with mass in all places; differentiable in the parameters."""
        log_p, log_q = (t.detach() for t in on_one_support(log_p, log_q, dim))
        if not bool(log_q.isfinite().all()):
            raise ValueError("a Family needs log_q finite; leave out the atoms that have no mass")
        return (log_q.exp() * self.curves.f(log_p - log_q)).sum(dim)
