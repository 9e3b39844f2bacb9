"""The networks that a recipe can name."""

from fdiv.diffusion.mixture import Mixture as Mixture  # that of a ClosedForm
from fdiv.networks.affine import Affine as Affine
from fdiv.networks.affine import ClosedForm as ClosedForm
from fdiv.networks.autoencoder import Autoencoder as Autoencoder
from fdiv.networks.autoencoder import ConvAutoencoder as ConvAutoencoder
from fdiv.networks.bias import BiasForce as BiasForce
from fdiv.networks.bias import Unbiased as Unbiased
from fdiv.networks.cnn import CNN as CNN
from fdiv.networks.denoiser import Denoiser as Denoiser
from fdiv.networks.energy import EnergyMLP as EnergyMLP
from fdiv.networks.gru import GRU as GRU
from fdiv.networks.latent import Latent as Latent
from fdiv.networks.mlp import MLP as MLP
from fdiv.networks.transformer import Transformer as Transformer
