"""Networks over the states of a table, seen through their features."""

import torch
from torch import Tensor, nn


def perceptron(inputs: int, outputs: int, width: int = 64) -> nn.Sequential:
    """One hidden layer with normalised activations; the output is 0 at first."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width), nn.ReLU(), last)


class OfState(nn.Module):
    """states [...] -> [..., outputs], plus what a table `start` [S, outputs] says of them."""

    def __init__(self, features: Tensor, outputs: int, start: Tensor | None = None, width: int = 64):
        super().__init__()
        self.features = nn.Buffer(features.float(), persistent=False)
        start = torch.zeros(len(features), outputs) if start is None else start.float()
        self.start = nn.Buffer(start, persistent=False)
        self.network = perceptron(features.shape[1], outputs, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.start[states] + self.network(self.features[states])

    @torch.no_grad()
    def table(self) -> Tensor:
        """The outputs at every state, float64 [S, outputs]."""
        return self(torch.arange(len(self.features))).double()


class OfStateAndAction(nn.Module):
    """states, actions [...] -> [...], a number of each pair."""

    def __init__(self, features: Tensor, actions: int, width: int = 64):
        super().__init__()
        self.actions = actions
        self.of_state = OfState(features, actions, width=width)

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        return self.of_state(states).gather(-1, actions.unsqueeze(-1)).squeeze(-1)


class Ensemble(nn.Module):
    """states [rows] -> [members, rows, outputs]: as many networks of one hidden layer, normalised."""

    def __init__(self, features: Tensor, outputs: int, members: int, width: int = 32):
        super().__init__()
        self.features = nn.Buffer(features.float(), persistent=False)
        inputs = features.shape[1]
        self.first = nn.Parameter(torch.randn(members, inputs, width) / inputs**0.5)
        self.first_bias = nn.Parameter(torch.zeros(members, 1, width))
        self.last = nn.Parameter(torch.randn(members, width, outputs) / width**0.5)
        self.last_bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, states: Tensor) -> Tensor:
        hidden = self.features[states] @ self.first + self.first_bias
        return nn.functional.layer_norm(hidden, hidden.shape[-1:]).relu() @ self.last + self.last_bias
