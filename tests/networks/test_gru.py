"""The recurrent network: its equations by hand, what a place of an image or a signal is, what it refuses."""

import pytest
import torch
from tests.worlds import close

from fdiv.adapters.classifier import Classifier
from fdiv.networks.gru import GRU

IMAGE, SIGNAL = torch.Size([2, 5, 3]), torch.Size([1, 7])


def built(spec, shape):
    return Classifier.fresh(spec, shape, 4, seed=0).model.double().eval()


@pytest.mark.parametrize(("shape", "places"), [(IMAGE, 5), (SIGNAL, 7)])
def test_every_layer_is_a_stage_and_the_last_place_the_features(shape, places):
    network = built(GRU(width=6, layers=2, dropout=0.5), shape)
    stages = network.stages(torch.randn(3, *shape, dtype=torch.float64))
    assert [tuple(s.shape) for s in stages] == [(3, places, 6), (3, places, 6), (3, 6)]
    assert torch.equal(stages[2], stages[1][:, -1])


def test_a_row_of_an_image_after_another_updates_the_state():
    """r = s(W_r x + U_r h), z = s(W_z x + U_z h), n = tanh(W_n x + r U_n h), h' = (1 - z) n + z h."""
    network, image = built(GRU(width=6), IMAGE), torch.randn(1, *IMAGE, dtype=torch.float64)
    weights = dict(network.blocks[0][1].cells.named_parameters())
    wr, wz, wn = weights["weight_ih_l0"].chunk(3)
    ur, uz, un = weights["weight_hh_l0"].chunk(3)
    br, bz, bn = weights["bias_ih_l0"].chunk(3)
    cr, cz, cn = weights["bias_hh_l0"].chunk(3)
    h = torch.zeros(6, dtype=torch.float64)
    for place in range(5):
        x = image[0, :, place].flatten()  # that row of both channels
        r, z = (wr @ x + br + ur @ h + cr).sigmoid(), (wz @ x + bz + uz @ h + cz).sigmoid()
        n = (wn @ x + bn + r * (un @ h + cn)).tanh()
        h = (1 - z) * n + z * h
    close(network.features(image)[0], h, 1e-12)
    close(network(image)[0], network.head(h), 1e-12)


def test_dropout_is_of_the_training_alone():
    network, signal = built(GRU(width=6, dropout=0.5), SIGNAL), torch.ones(1, *SIGNAL, dtype=torch.float64)
    assert torch.equal(network(signal), network(signal))
    network.train()
    assert any((network(signal) != network(signal)).any() for _ in range(5))


def test_what_has_no_places_and_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="reads signals"):
        GRU().build(torch.Size([13]), 2)
    for settings in ({"width": 0}, {"layers": 0}):
        with pytest.raises(ValueError, match="number of at least 1"):
            GRU(**settings)
    with pytest.raises(ValueError, match="share of the cells"):
        GRU(dropout=1.0)
