"""DEPICT: its targets in closed form, what a step learns from, and its tables over two epochs."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.worlds import close, each_divergence, gradient, random_rows

import fdiv
from fdiv import KL
from fdiv.methods._method import Method
from fdiv.methods.represent.depict import DEPICT, imbalance, log_target
from fdiv.methods.represent.k_means import k_means
from fdiv.methods.represent.reconstruction import Reconstruction
from fdiv.networks.autoencoder import Autoencoder, ConvAutoencoder
from fdiv.networks.mlp import MLP
from fdiv.tasks.labelled import Labelled

F64 = torch.float64


# -- targets --------------------------------------------------------------------------------------------


def test_targets_are_predictions_over_the_root_of_their_clusters_size():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.75, 0.25]], dtype=F64)
    size = p.sum(0)  # 2.25 and 0.75, a ratio of 3
    odds = p[:, 0] / p[:, 1] / math.sqrt(3.0)
    close(size[0] / size[1], torch.tensor(3.0, dtype=F64))
    close(log_target(p.log()).exp()[:, 0], odds / (1 + odds), 1e-12)


def test_the_square_form_is_that_of_deep_embedded_clustering():
    p = random_rows(20, 4).exp()
    weighed = p.square() / p.sum(0)
    close(log_target(p.log(), 2.0, 1.0).exp(), weighed / weighed.sum(1, keepdim=True), 1e-12)


def test_balanced_predictions_are_their_own_target():
    p = random_rows(1, 5).exp()[0]
    rolled = torch.stack([p.roll(n) for n in range(5)])  # every column has the sum 1
    close(log_target(rolled.log()), rolled.log(), 1e-12)
    assert imbalance(rolled.log()).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("power", "balance"), [(1.0, 0.5), (2.0, 1.0)])
def test_target_rows_sum_to_one_and_their_clusters_are_more_alike_in_size(power, balance):
    log_p = random_rows(50, 5) + torch.tensor([2.0, 1.0, 0.0, 0.0, -1.0], dtype=F64)
    log_p = log_p.log_softmax(-1)
    q = log_target(log_p, power, balance)
    close(q.logsumexp(-1), torch.zeros(50, dtype=F64), 1e-9)
    assert imbalance(q) < imbalance(log_p)


def objective(log_q, log_p):
    return KL()(log_q, log_p).mean() + imbalance(log_q)


def minimiser(log_p, rounds=500):
    """The exact target: q_ik ~ p_ik / f_k with f its own mean, as a damped fixed point."""
    log_f = torch.zeros(log_p.shape[1], dtype=F64)
    for _ in range(rounds):
        log_q = (log_p - log_f).log_softmax(-1)
        log_f = (log_f + log_q.logsumexp(0) - math.log(len(log_p))) / 2
    return log_q


def test_the_target_minimises_the_objective_where_all_rows_are_equal():
    log_p = random_rows(1, 5).expand(7, 5)
    close(log_target(log_p), (log_p / 2).log_softmax(-1), 1e-12)
    close(log_target(log_p), minimiser(log_p), 1e-9)


def test_elsewhere_it_gains_most_of_what_the_minimum_does():
    for seed in range(10):
        log_p = (random_rows(40, 4, seed) + torch.tensor([1.5, 0.0, 0.0, -1.0], dtype=F64)).log_softmax(-1)
        best, plain = objective(minimiser(log_p), log_p), objective(log_p, log_p)
        gained = plain - objective(log_target(log_p), log_p)
        assert 0.8 * (plain - best) < gained <= plain - best + 1e-12


def test_the_damped_fixed_point_is_a_minimum():
    log_p = random_rows(12, 3, seed=4)
    log_q = minimiser(log_p)
    for seed in range(20):
        other = (log_q + 0.1 * torch.randn(12, 3, generator=torch.Generator().manual_seed(seed))).log_softmax(
            -1
        )
        assert objective(other, log_p) > objective(log_q, log_p)


def test_a_cluster_without_mass_stays_empty_and_peaked_predictions_stay_finite():
    log_p = torch.tensor([[0.0, -1e4, -math.inf], [-1e4, 0.0, -math.inf]], dtype=F64)
    q = log_target(log_p)
    assert (q[:, 2] == -math.inf).all()
    assert q[:, :2].isfinite().all()
    close(q.exp().sum(1), torch.ones(2, dtype=F64))


# -- a step ---------------------------------------------------------------------------------------------


def world(count=24, dropout=0.0, dtype=F64):
    torch.manual_seed(0)
    network = (
        Autoencoder(width=8, layers=2, latent=3, dropout=dropout).build(torch.Size([1, 2, 3]), 4).to(dtype)
    )
    centres = 3 * torch.eye(6, dtype=dtype)[:4].reshape(4, 1, 2, 3)
    inputs = centres.repeat(count // 4, 1, 1, 1) + 0.1 * torch.randn(count, 1, 2, 3, dtype=dtype)
    memory = DEPICT().initial_memory(Labelled(inputs, torch.zeros(count)), network)
    return network, inputs, memory


def run(method, network, inputs, memory, progress=0.5, rows=slice(None), count=None):
    index = torch.arange(len(inputs))[rows]
    return method(
        inputs=inputs[index],
        index=index,
        network=network,
        memory=memory,
        progress=progress,
        count=len(index) if count is None else count,
    )


def remember(method, network, inputs, memory, progress, rows=slice(None)):
    index = torch.arange(len(inputs))[rows]
    method.remember(memory=memory, inputs=inputs[index], index=index, network=network, progress=progress)


def test_it_is_a_method_that_reads_no_labels():
    assert isinstance(DEPICT(), Method) and isinstance(Reconstruction(), Method)
    assert "labels" not in DEPICT.reads


NETWORKS = [
    (Autoencoder(width=8, layers=2, latent=3), (1, 2, 3), [(8,), (8,), (3,)]),
    (Autoencoder(width=5, layers=1, latent=2), (7,), [(5,), (2,)]),
    (ConvAutoencoder(width=4, layers=2, latent=3), (1, 8, 4), [(4, 4, 2), (8, 2, 1), (3,)]),
    (ConvAutoencoder(width=4, layers=1, latent=3, dropout=0.0), (3, 2, 2), [(4, 1, 1), (3,)]),
]


@pytest.mark.parametrize(("spec", "shape", "stages"), NETWORKS, ids=repr)
def test_the_networks_restore_the_shapes_of_their_stages(spec, shape, stages):
    network = spec.build(torch.Size(shape), 4).eval()
    inputs = torch.randn(5, *shape)
    made = network.stages(inputs)
    assert [tuple(stage.shape[1:]) for stage in made] == stages
    assert [t.shape for t in network.decode(made[-1])] == [t.shape for t in [inputs, *made[:-1]]]
    assert network.features(inputs).abs().max() < 1
    assert network(inputs).shape == (5, 4)
    assert torch.equal(network.train()(inputs), network(inputs)) == (spec.dropout == 0)


def test_the_first_clusters_are_those_of_k_means_on_the_references_features():
    network, inputs, memory = world()
    expected = k_means(network.eval().features(inputs), 4)
    assert torch.equal(memory["cluster"], expected)
    assert len(memory["cluster"].unique()) == 4
    close(memory["log_p"].exp(), torch.full((24, 4), 0.25, dtype=F64))


def test_in_warm_up_the_loss_is_the_log_likelihood_of_the_clusters():
    network, inputs, memory = world()
    out = run(DEPICT(reconstruction=0.0, warmup=0.5), network, inputs, memory, 0.49)
    expected = torch.nn.functional.cross_entropy(network(inputs), memory["cluster"])
    close(out.loss, expected, 1e-12)


@each_divergence
def test_after_it_the_loss_is_the_divergence_of_the_targets_plus_the_reconstruction(divergence):
    network, inputs, memory = world()
    memory["log_target"] = random_rows(24, 4)
    out = run(DEPICT(divergence, reconstruction=2.0, hidden=0.3), network, inputs, memory)
    features, restored = network.stages(inputs), network.decode(network.features(inputs))
    squares = (restored[0] - inputs).square().mean()
    squares = squares + 0.3 * sum(
        (a - b).square().mean() for a, b in zip(features, restored[1:], strict=False)
    )
    apart = divergence(memory["log_target"], network(inputs).log_softmax(-1)).mean()
    close(out.loss, apart + 2.0 * squares, 1e-12)
    weights = list(network.parameters())
    close(gradient(out.loss, *weights), gradient(apart + 2.0 * squares, *weights), 1e-9)
    close(out.metrics["reconstruction"], squares.detach())


def test_its_gradient_is_that_of_the_cross_entropy():
    network, inputs, memory = world()
    memory["log_target"] = random_rows(24, 4)
    out = run(DEPICT(reconstruction=0.0), network, inputs, memory)
    entropy = -(memory["log_target"].exp() * network(inputs).log_softmax(-1)).sum(-1).mean()
    used = [*network.blocks.parameters(), *network.head.parameters()]
    close(gradient(out.loss, *used), gradient(entropy, *used), 1e-10)


def test_the_noisy_path_learns_and_the_clean_one_is_restored():
    network, inputs, memory = world(dropout=0.5)
    network.train()
    torch.manual_seed(5)
    out = run(DEPICT(warmup=0.0), network, inputs, memory)
    assert all(module.training for module in network.modules())
    torch.manual_seed(5)
    noisy = network.features(inputs)
    restored = network.decode(noisy)
    clean = network.eval().stages(inputs)
    squares = (restored[0] - inputs).square().mean()
    squares = squares + 0.1 * sum((a - b).square().mean() for a, b in zip(clean, restored[1:], strict=False))
    apart = KL()(memory["log_target"], network.head(noisy).log_softmax(-1)).mean()
    close(out.loss, apart + squares, 1e-12)
    assert not torch.allclose(noisy, clean[-1])


def test_without_a_cluster_term_it_is_the_denoising_autoencoder():
    network, inputs, memory = world()
    pure = Reconstruction()(inputs=inputs, network=network, count=24)
    both = run(DEPICT(), network, inputs, memory)
    close(both.loss - both.metrics["divergence"], pure.loss, 1e-12)
    parts = [Reconstruction()(inputs=inputs[i], network=network, count=24).loss
             for i in (slice(0, 10), slice(10, 24))]  # fmt: skip
    close(sum(parts), pure.loss, 1e-12)


# -- the tables -----------------------------------------------------------------------------------------


def test_targets_change_once_every_example_was_seen_and_not_within_the_warm_up():
    network, inputs, memory = world(dropout=0.5)
    method = DEPICT(warmup=0.5)
    uniform = memory["log_target"].clone()
    first, second = slice(0, 12), slice(12, 24)
    for rows in (first, second, first):
        remember(method, network, inputs, memory, 0.4, rows)
    assert torch.equal(memory["log_target"], uniform)
    with torch.no_grad():
        clean = network.eval()(inputs).log_softmax(-1)
    close(memory["log_p"], clean, 1e-12)
    network.train()
    remember(method, network, inputs, memory, 0.5, second)
    close(memory["log_target"], log_target(clean), 1e-12)
    assert memory["seen"] == 0
    with torch.no_grad():
        network.head.bias += torch.tensor([2.0, 0.0, 0.0, 0.0])
    kept = memory["log_target"].clone()
    remember(method, network, inputs, memory, 0.6, first)
    assert torch.equal(memory["log_target"], kept)
    remember(method, network, inputs, memory, 0.6, second)
    assert not torch.allclose(memory["log_target"], kept)
    assert all(module.training for module in network.modules())


def test_training_finds_clusters_that_lie_apart_whatever_the_target():
    start, inputs, _ = world(count=40, dropout=0.1, dtype=torch.float32)
    taught(start, lambda step: Reconstruction()(inputs=inputs, network=start, count=40).loss, 200)
    for method in (DEPICT(warmup=0.4), DEPICT(fdiv.JS(0.5), power=2.0, balance=1.0, warmup=0.4)):
        network = copy.deepcopy(start)
        memory = method.initial_memory(Labelled(inputs, torch.zeros(40)), start)

        def loss(step, method=method, network=network, memory=memory):
            remember(method, network, inputs, memory, step / 100)
            return run(method, network, inputs, memory, step / 100).loss

        taught(network, loss, 100)
        clusters = network.eval()(inputs).argmax(-1)
        assert torch.equal(clusters[:4].repeat(10), clusters)
        assert len(clusters.unique()) == 4
        assert imbalance(memory["log_p"]) < 0.01


def taught(network, loss, steps):
    optimizer = torch.optim.Adam(network.train().parameters(), 0.02)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()


def test_far_logits_and_no_rows_are_finite():
    network, inputs, memory = world(dtype=torch.float32)
    weights = list(network.parameters())
    with torch.no_grad():
        network.head.weight *= 1e5
    for progress in (0.0, 0.9):
        loss = run(DEPICT(), network, inputs, memory, progress).loss
        assert loss.isfinite()
        assert gradient(loss, *weights).isfinite().all()
    remember(DEPICT(warmup=0.0), network, inputs, memory, 0.9)
    assert memory["log_target"].isfinite().all()
    nothing = run(DEPICT(), network, inputs, memory, rows=slice(0, 0), count=0)
    assert nothing.loss.item() == 0
    assert not gradient(nothing.loss, *weights).any()


# -- what is refused ------------------------------------------------------------------------------------


def test_examples_that_are_not_trained_on_have_no_target():
    network, inputs, memory = world()
    with pytest.raises(ValueError, match="validate_every"):
        DEPICT()(
            inputs=inputs[:2], index=torch.tensor([-1, -1]), network=network, memory=memory, progress=0.5
        )


def test_a_network_without_a_decoder_and_a_missing_reference_are_refused():
    plain = MLP(width=4, layers=1).build(torch.Size([1, 2, 3]), 4).double()
    _, inputs, memory = world()
    with pytest.raises(TypeError, match=r"Autoencoder\(\)"):
        run(DEPICT(), plain, inputs, memory)
    with pytest.raises(TypeError, match=r"Autoencoder\(\)"):
        Reconstruction()(inputs=inputs, network=plain)
    with pytest.raises(ValueError, match="there is none"):
        DEPICT().initial_memory(Labelled(inputs, torch.zeros(24)), None)
    with pytest.raises(ValueError, match="do not make"):
        k_means(torch.randn(3, 2), 4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"power": 0.0}, "power"),
        ({"balance": -1.0}, "balance"),
        ({"reconstruction": math.inf}, "reconstruction"),
        ({"hidden": -0.1}, "hidden"),
        ({"warmup": 2.0}, "warmup"),
        ({"restarts": 0}, "restarts"),
    ],
)
def test_bad_values_are_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        replace(DEPICT(), **wrong)
    if "hidden" in wrong:
        with pytest.raises(ValueError, match=says):
            Reconstruction(**wrong)


def test_only_f_divergences_compare_target_and_prediction():
    with pytest.raises(TypeError, match="f-divergence"):
        DEPICT(fdiv.Energy())
    with pytest.raises(ValueError, match="dropout"):
        Autoencoder(dropout=1.0)
    with pytest.raises(ValueError, match=r"2 times, got inputs of shape \(1, 6, 6\)"):
        ConvAutoencoder().build(torch.Size([1, 6, 6]), 4)
