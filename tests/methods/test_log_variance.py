"""The log-variance divergence: Brownian closed forms, its gradient on policy, and trajectory balance."""

import math

import pytest
import torch
from tests.worlds import close, gradient
from torch import nn

from fdiv.divergences.kl import ReverseKL
from fdiv.methods._method import READABLE_IN_PATHS, Method
from fdiv.methods.paths.log_variance import LogPartition, LogVariance, tempered
from fdiv.networks.bias import BiasForce, Unbiased

STEPS = 8
METHODS = [LogVariance(), LogVariance(control="batch"), LogVariance(control=None)]


class Drift(nn.Module):
    """A constant force."""

    def __init__(self, force: float):
        super().__init__()
        self.force = nn.Parameter(torch.tensor(force, dtype=torch.float64))

    def forward(self, x, target, when=None):
        return self.force.expand(x.shape)


def brownian(count=64, drift=0.3, horizon=2.0, steps=STEPS, variance=1.0, seed=0):
    """Paths of a drift on the line without a force of their own; of one step, they are drawn evenly."""
    if steps == 1:
        levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        noise = torch.distributions.Normal(0.0, 1.0).icdf(levels).reshape(count, 1, 1)
    else:
        noise = torch.randn(count, steps, 1, generator=torch.Generator().manual_seed(seed)).double()
    step = horizon / steps
    moves = drift * step + math.sqrt(variance * step) * noise
    positions = torch.cat([torch.zeros(count, 1, 1).double(), moves.cumsum(1)], 1)
    return {
        "positions": positions,
        "moves": moves,
        "when": torch.arange(steps) / steps,
        "length": torch.full((count,), steps),
        "target": torch.ones(1).double(),
        "step_size": step,
        "variance": variance,
    }


def out_of(method, network, paths, log_reward, **more):
    return method(network=network, log_reward=log_reward, **paths, **more)


@pytest.mark.parametrize("effective", [0.02, 0.1, 0.5, 0.9])
def test_weights_are_tempered_until_enough_paths_count(effective):
    log_weight = 5 * torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = tempered(log_weight, effective)
    assert (1 / found.square().sum() / 400).item() == pytest.approx(effective, rel=1e-6)
    slope = found.log().diff() / log_weight.diff()  # one power of all weights
    close(slope, slope[:1].expand(399), 1e-6)
    assert 0 < slope[0] < 1
    close(tempered(log_weight - 1e4, effective), found, 1e-6)


def test_weights_of_which_enough_count_are_left_alone():
    log_weight = torch.randn(50, generator=torch.Generator().manual_seed(0)).double()
    close(tempered(log_weight, 0.1), log_weight.softmax(0))
    close(tempered(torch.zeros(5).double(), 1.0), torch.full((5,), 0.2, dtype=torch.float64))


def test_paths_are_underrated_by_the_law_that_is_wanted_over_the_samplers():
    paths, reward = brownian(count=40), torch.zeros(40).double()
    method, law = LogVariance(importance=0.5, effective=1e-9), Drift(0.4)
    gap = method.log_ratio(network=law, log_reward=reward, **paths)
    close(method.underrated(gap), (-gap).softmax(0))


def test_it_is_a_method_and_reads_what_the_table_names():
    for method in METHODS:
        assert isinstance(method, Method)
        names = {name for names in READABLE_IN_PATHS for name in names.split(", ")}
        assert set(method.reads) <= names
    assert LogVariance().divergence == ReverseKL()


# -- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1.0, 0.4])
@pytest.mark.parametrize("drift", [-1.0, 0.0, 0.7])
def test_of_brownian_motion_it_is_the_square_of_what_the_drift_lacks_whoever_drew_the_paths(drift, variance):
    """reward = -k x_T / variance wants the drift -k: l = ((u + k) x_T - u^2 T / 2) / variance."""
    u, k, horizon = 0.5, 1.3, 2.0
    paths = brownian(4000, drift, horizon, variance=variance)
    end = paths["positions"][:, -1, 0]
    found = out_of(LogVariance(control="batch"), Drift(u), paths, -k * end / variance)
    close(found.loss, (u + k) ** 2 * end.var() / variance**2, 1e-9)
    close(found.loss, torch.tensor((u + k) ** 2 * horizon / variance).double(), 0.1)
    close(found.metrics["log ratio"], ((u + k) * end.mean() - u**2 * horizon / 2) / variance, 1e-9)


def test_at_the_wanted_law_every_path_says_minus_log_z():
    k, horizon = 1.3, 2.0
    paths = brownian(16, drift=0.9, horizon=horizon)
    reward = -k * paths["positions"][:, -1, 0]
    gaps = LogVariance().log_ratio(network=Drift(-k), log_reward=reward, **paths)
    close(gaps, torch.full_like(gaps, -(k**2) * horizon / 2), 1e-12)
    module = LogPartition().double()
    start = {"log_partition": torch.tensor(k**2 * horizon / 2, dtype=torch.float64)}
    assert out_of(LogVariance(), Drift(-k), paths, reward, module=module, memory=start).loss < 1e-20
    assert LogVariance().initial_memory(network=Drift(-k), log_reward=reward, **paths) == {
        "log_partition": pytest.approx(k**2 * horizon / 2)
    }


@pytest.mark.parametrize("u", [-0.4, 0.8])
def test_on_policy_its_gradient_is_twice_that_of_kl_and_off_policy_it_is_not(u):
    """reward = -c x_T^2 / 2: KL(Q, P) - log Z = u^2 T / 2 + c (u^2 T^2 + T) / 2."""
    c, horizon, network = 0.6, 1.5, Drift(u)
    kl_slope = u * horizon + c * u * horizon**2
    for drift, expected in ((u, 2 * kl_slope), (u + 1, None)):
        paths = brownian(200_001, drift, horizon, steps=1)
        reward = -c * paths["positions"][:, -1, 0].square() / 2
        slope = gradient(out_of(LogVariance(control="batch"), network, paths, reward).loss, network.force)
        if expected is not None:
            close(slope, torch.tensor([expected]).double(), 2e-3)
        else:
            assert abs(slope.item() - 2 * kl_slope) > 0.1


def test_trajectory_balance_minimised_over_log_z_is_the_variance():
    paths, network = brownian(32), BiasForce("force").build(torch.Size([1]), 1).double()
    reward = -paths["positions"][:, -1, 0].pow(4)
    gaps = LogVariance().log_ratio(network=network, log_reward=reward, **paths)
    module = LogPartition().double()
    with torch.no_grad():
        module.shift.copy_(-gaps.mean() / LogVariance().pace)
    balance = out_of(LogVariance(), network, paths, reward, module=module).loss
    variance = out_of(LogVariance(control="batch"), network, paths, reward).loss
    close(balance, variance * 31 / 32, 1e-9)
    ours, theirs = (gradient(loss, *network.parameters()) for loss in (balance, variance * 31 / 32))
    close(ours, theirs, 1e-8)
    assert gradient(balance, module.shift).abs() < 1e-9
    worse = LogVariance()(
        network=network,
        log_reward=reward,
        module=module,
        memory={"log_partition": torch.tensor(0.5)},
        **paths,
    )
    close(worse.loss, balance + 0.25, 1e-6)


def test_the_variance_of_small_batches_is_unbiased():
    """Over all pairs of six paths, with repetition, its mean is the variance of the six."""
    paths, network = brownian(6), Drift(0.2)
    reward = -paths["positions"][:, -1, 0].square()
    method, found = LogVariance(control="batch"), []
    for first in range(6):
        for second in range(6):
            pair = torch.tensor([first, second])
            rows = {name: paths[name][pair] for name in ("positions", "moves", "length")}
            found.append(out_of(method, network, paths | rows, reward[pair]).loss)
    everything = method.log_ratio(network=network, log_reward=reward, **paths)
    close(torch.stack(found).mean(), everything.var(correction=0), 1e-12)


def test_without_a_control_it_is_the_mean_square():
    paths, network = brownian(8), Drift(0.2)
    reward = -paths["positions"][:, -1, 0]
    gaps = LogVariance().log_ratio(network=network, log_reward=reward, **paths)
    close(out_of(LogVariance(control=None), network, paths, reward).loss, gaps.square().mean(), 1e-12)


# -- what is counted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_no_gradient_reaches_the_paths(method):
    paths, network = brownian(4), BiasForce("potential").build(torch.Size([1]), 1).double()
    for name in ("positions", "moves"):
        paths[name].requires_grad_()
    more = {"module": LogPartition()} if method.control == "learned" else {}
    out_of(method, network, paths, -torch.arange(4.0), **more).loss.backward()
    assert paths["positions"].grad is None and paths["moves"].grad is None
    assert all(
        p.grad is not None for p in list(network.parameters())[:-1]
    )  # an energy's constant has no force


def test_the_mean_reduction_divides_the_log_ratio_alone():
    paths, network, reward = brownian(4), Drift(0.2), torch.arange(4.0).double()
    whole, tempered = (
        LogVariance(reduction=r).log_ratio(network=network, log_reward=reward, **paths)
        for r in ("sum", "mean")
    )
    close(tempered + reward, (whole + reward) / STEPS, 1e-12)


def test_steps_behind_the_nearest_place_do_not_count_where_it_is_truncated():
    paths, network, reward = brownian(4), Drift(0.2), torch.zeros(4).double()
    paths["length"] = torch.tensor([1, 3, STEPS, 5])
    short = LogVariance().log_ratio(network=network, log_reward=reward, **paths)
    whole = LogVariance(truncated=False).log_ratio(network=network, log_reward=reward, **paths)
    steps = 0.2 * paths["moves"].squeeze(-1) - 0.2**2 * paths["step_size"] / 2
    close(short, torch.stack([row[:n].sum() for row, n in zip(steps, paths["length"], strict=True)]), 1e-12)
    close(whole, steps.sum(1), 1e-12)


def test_micro_batches_add_up_where_a_batch_may_be_split():
    paths, network, reward = brownian(6), Drift(0.2), torch.arange(6.0).double()
    whole = out_of(LogVariance(control=None), network, paths, reward).loss
    parts = []
    for some in (slice(0, 2), slice(2, 6)):
        rows = {name: paths[name][some] for name in ("positions", "moves", "length")}
        parts.append(out_of(LogVariance(control=None), network, paths | rows, reward[some], count=6).loss)
    close(torch.stack(parts).sum(), whole, 1e-12)
    assert LogVariance(control="batch").unit == "batch" and LogVariance().unit is None


# -- edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_extreme_rewards_are_finite_and_infinite_ones_refused(method):
    paths, network = brownian(4), Drift(0.2)
    more = {"module": LogPartition()} if method.control == "learned" else {}
    loss = out_of(method, network, paths, torch.tensor([-1e4, 1e4, 0.0, -1e4]), **more).loss
    assert loss.isfinite() and gradient(loss, network.force).isfinite().all()
    with pytest.raises(ValueError, match="finite"):
        out_of(method, network, paths, torch.tensor([-math.inf, 0.0, 0.0, 0.0]), **more)


def test_no_path_costs_nothing_and_one_has_no_variance():
    none = {name: t[:0] for name, t in brownian(4).items() if name in ("positions", "moves", "length")}
    network = Drift(0.2)
    out = out_of(LogVariance(control=None), network, brownian(4) | none, torch.zeros(0), count=4)
    assert out.loss == 0 and out.metrics == {} and gradient(out.loss, network.force) == 0
    one = {name: t[:1] for name, t in brownian(4).items() if name in ("positions", "moves", "length")}
    with pytest.raises(ValueError, match="at least 2 paths"):
        out_of(LogVariance(control="batch"), network, brownian(4) | one, torch.zeros(1))
    with pytest.raises(ValueError, match="module"):
        out_of(LogVariance(), network, brownian(4), torch.zeros(4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"control": "global"},
        {"reduction": "none"},
        {"pace": 0.0},
        {"hot": math.inf},
        {"paths": 0},
        {"capacity": 1.5},
    ],
)
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LogVariance(**wrong)


def test_roll_outs_cool_down_to_the_wanted_temperature():
    assert [LogVariance(hot=3.0).heat(progress) for progress in (0.0, 0.5, 1.0)] == [3.0, 2.0, 1.0]


# -- forces -------------------------------------------------------------------------------------------------

ATOMS = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGET = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_a_scaled_force_points_each_atom_to_its_target():
    network = BiasForce("scale").build(torch.Size([4, 3]), 12).double()
    way = TARGET - ATOMS
    scale = network(ATOMS, TARGET) / way
    assert (scale > 0).all()
    close(scale, scale[..., :1].expand_as(scale), 1e-9)


def test_a_potential_force_is_minus_its_gradient_and_has_no_curl():
    network = BiasForce("potential").build(torch.Size([4, 3]), 12).double()
    with torch.no_grad():
        still = network(ATOMS[:1], TARGET).reshape(-1)
        near = ATOMS[:1] + 1e-5 * torch.eye(12).double().reshape(12, 4, 3)
        change = (network(near, TARGET).reshape(12, 12) - still) / 1e-5
    close(change, change.T.contiguous(), 1e-3)


def test_a_force_is_any_and_a_timed_one_needs_the_time():
    network = BiasForce("force", timed=True).build(torch.Size([2]), 2)
    x, target = torch.randn(3, 7, 2), torch.ones(2)
    early, late = (network(x, target, torch.full((7,), when)) for when in (0.0, 0.9))
    assert early.shape == x.shape and not torch.equal(early, late)
    with pytest.raises(ValueError, match="when"):
        network(x, target)
    assert (Unbiased().build(torch.Size([2]), 2)(x, target) == 0).all()
    assert network(x[:0], target, torch.zeros(7)).shape == (0, 7, 2)


def test_wrong_forces_are_refused():
    with pytest.raises(ValueError, match="form"):
        BiasForce("sideways")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="as many numbers"):
        BiasForce().build(torch.Size([2]), 3)
