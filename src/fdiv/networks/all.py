"""The networks that a recipe can name."""

from fdiv.networks.cnn import CNN as CNN
from fdiv.networks.mlp import MLP as MLP
from fdiv.networks.transformer import Transformer as Transformer
