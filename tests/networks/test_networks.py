"""Networks over labelled inputs: their stages, what they refuse, and that they are kept."""

import pytest
import torch

import fdiv
from fdiv.adapters.classifier import Classifier
from fdiv.feeds.reading import shapes_of
from fdiv.networks.all import CNN, MLP, Transformer

IMAGE, SIGNAL, ROW = torch.Size([1, 8, 8]), torch.Size([1, 40]), torch.Size([13])
CASES = [
    (MLP(width=6, layers=3, dropout=0.5), ROW, [(6,)] * 3),
    (MLP(width=6), IMAGE, [(6,)] * 2),
    (CNN(width=4, blocks=3), IMAGE, [(4, 4, 4), (8, 2, 2), (16, 1, 1), (16,)]),
    (CNN(width=4, blocks=1), SIGNAL, [(4, 20), (4,)]),
    (Transformer(width=8, layers=2, heads=2), IMAGE, [(16, 8), (16, 8), (8,)]),
    (Transformer(width=8, layers=1, heads=2, patch=4), SIGNAL, [(10, 8), (8,)]),
]


@pytest.mark.parametrize(("spec", "shape", "stages"), CASES, ids=lambda v: repr(v).replace(" ", ""))
def test_stages_have_the_shapes_that_are_said_and_the_head_reads_the_last(spec, shape, stages):
    network = Classifier.fresh(spec, shape, 5, seed=0).model.eval()
    inputs = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    made = network.stages(inputs)
    assert [tuple(stage.shape[1:]) for stage in made] == stages
    assert shapes_of(network, network, inputs) == (
        stages[-1][0],
        5,
        tuple(map(torch.Size, stages)),
        stages[-1][0],
        tuple(map(torch.Size, stages)),
    )
    torch.testing.assert_close(network(inputs), network.head(made[-1]))


@pytest.mark.parametrize(("spec", "shape", "stages"), CASES[::2], ids=lambda v: repr(v).replace(" ", ""))
def test_weights_depend_on_the_seed_alone_and_survive_saving(spec, shape, stages, tmp_path):
    one, same, other = (Classifier.fresh(spec, shape, 5, seed) for seed in (0, 0, 1))
    assert one.fingerprint() == same.fingerprint() != other.fingerprint()
    one.save(tmp_path)
    assert Classifier.load(tmp_path).fingerprint() == one.fingerprint()
    assert Classifier.load(tmp_path).method is None


def test_the_method_that_reads_the_scores_is_kept_beside_the_weights(tmp_path, monkeypatch):
    made = Classifier.fresh(MLP(width=2), ROW, 3, seed=0)
    made.method = fdiv.GKD(divergence=fdiv.JS(0.3))  # any object that fdiv knows by name
    made.save(tmp_path)
    assert Classifier.load(tmp_path).method == made.method


def test_an_example_of_a_transformer_knows_its_place():
    network = Transformer(width=8, heads=2).build(IMAGE, 3).eval()
    image = torch.rand(1, *IMAGE)
    assert not torch.allclose(network(image), network(image.roll(4, dims=-1)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MLP(width=0), r"MLP\(width\) is a number of at least 1"),
        (lambda: MLP(dropout=1.0), r"in \[0, 1\)"),
        (lambda: CNN().build(ROW, 2), r"write MLP\(\)"),
        (lambda: CNN(blocks=4).build(IMAGE, 2), "halves its input 4 times"),
        (lambda: Transformer(width=6, heads=4), "evenly"),
        (lambda: Transformer(patch=3).build(IMAGE, 2), "multiple of the patch"),
        (lambda: Classifier.load("nowhere"), "holds no network.json"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(make, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        make()
