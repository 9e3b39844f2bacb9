"""ROSE: advantages of trees worked out by hand, by enumeration of nodes, and reductions to GRPO."""

from itertools import pairwise

import pytest
import torch
from tests.worlds import close

from fdiv import GRPO, JS, Exact, FusedLinear, MonteCarlo, ReverseKL
from fdiv.methods._method import Method
from fdiv.methods.rl.rose import ROSE, common_tokens, shortened, stretch_advantage
from fdiv.sample.branching import Branching

# A tree of five answers: 1 leaves 0 behind two tokens, 2 leaves 1 behind three, 3 leaves 0 behind four, and 4
# begins at the root.
LENGTH = torch.tensor([6, 5, 4, 6, 3])
PARENT = torch.tensor([-1, 0, 1, 0, -1])
BRANCH = torch.tensor([0, 2, 3, 4, 0])
REWARD = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
GROUP = torch.zeros(5, dtype=torch.long)
MASK = torch.arange(6) < LENGTH.unsqueeze(1)
TREE = {"reward": REWARD, "group": GROUP, "parent": PARENT, "branch": BRANCH}
ALL, TWO, THREE, FOUR = 3 / 5, 3 / 4, 1 / 2, 1.0  # V of the root, and of the places named by their depth


def advantage(reward=REWARD, mask=MASK, group=GROUP, parent=PARENT, branch=BRANCH):
    return stretch_advantage(reward, mask, group, common_tokens(mask.sum(1), group, parent, branch))


def tokens(rows, width, seed, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return -scale * torch.rand(rows, width, generator=generator, dtype=torch.float64)


def update(method, mask=MASK, behaviour=None, **given):
    """(loss, its gradient in the policy's log-probabilities) of a method that reads rollouts."""
    policy = tokens(*mask.shape, seed=0).requires_grad_()
    behaviour = tokens(*mask.shape, seed=1) if behaviour is None else behaviour
    if method.beta:
        given |= {"log_p": tokens(*mask.shape, seed=2), "log_q": policy}
    out = method(log_policy=policy, log_behaviour=behaviour, mask=mask, **given)
    return out, torch.autograd.grad(out.loss, policy)[0]


# -- the tree ---------------------------------------------------------------------------------------------


def test_answers_have_in_common_what_they_have_by_descent():
    expected = [[6, 2, 2, 4, 0], [2, 5, 3, 2, 0], [2, 3, 4, 2, 0], [4, 2, 2, 6, 0], [0, 0, 0, 0, 3]]
    assert common_tokens(LENGTH, GROUP, PARENT, BRANCH).tolist() == expected


def test_the_advantages_of_a_tree_are_those_worked_out_by_hand():
    rise = TWO - ALL
    expected = [
        [rise, rise, FOUR - TWO, FOUR - TWO, 1 - FOUR, 1 - FOUR],
        [rise, rise, THREE - TWO, 0 - THREE, 0 - THREE, 0],
        [rise, rise, THREE - TWO, 1 - THREE, 0, 0],
        [rise, rise, FOUR - TWO, FOUR - TWO, 1 - FOUR, 1 - FOUR],
        [0 - ALL, 0 - ALL, 0 - ALL, 0, 0, 0],
    ]
    close(advantage(), torch.tensor(expected, dtype=torch.float64))


def test_what_is_told_does_not_depend_on_the_prompt_before_it():
    moved = torch.cat([torch.zeros(5, 3, dtype=torch.bool), MASK], 1)
    close(advantage(mask=moved)[:, 3:], advantage())
    assert not advantage(mask=moved)[:, :3].any()


def grown(size, generator):
    """A random tree: tokens of each answer, and the tree."""
    answers, parent, branch = [], [], []
    for number in range(size):
        over = torch.randint(-1, number, (), generator=generator).item() if number else -1
        kept = torch.randint(1, len(answers[over]), (), generator=generator).item() if over >= 0 else 0
        more = torch.randint(1, 5, (), generator=generator).item()
        own = [f"{number}.{n}" for n in range(more + 1)]  # tokens that no other answer writes
        answers.append([*(answers[over][:kept] if over >= 0 else []), *own])
        parent.append(over)
        branch.append(kept)
    return answers, torch.tensor(parent), torch.tensor(branch)


def test_advantages_are_differences_of_values_of_nodes_on_random_trees():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        answers, parent, branch = grown(7, generator)
        reward = torch.rand(7, generator=generator, dtype=torch.float64)
        mask = torch.arange(max(map(len, answers))) < torch.tensor([len(a) for a in answers]).unsqueeze(1)
        told = advantage(reward, mask, torch.zeros(7, dtype=torch.long), parent, branch)

        def value(prefix, answers=answers, reward=reward):
            through = [n for n, a in enumerate(answers) if a[: len(prefix)] == prefix]
            return reward[through].mean().item()

        def leaves(a, answers=answers):
            """Where others leave this answer: the depth of the longest common beginning with each."""
            depths = {next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)) for b in answers
                      if b != a}  # fmt: skip
            return sorted(depths | {0, len(a)})

        for n, answer in enumerate(answers):
            nodes = leaves(answer)
            for low, high in pairwise(nodes):
                rise = value(answer[:high]) - value(answer[:low])
                close(told[n, low:high], torch.full((high - low,), rise, dtype=torch.float64))


def test_each_answers_advantages_add_up_over_its_nodes_to_its_reward_less_the_groups_mean():
    steps = torch.cat([advantage()[:, :1], advantage().diff(dim=1)], 1)
    starts = torch.zeros(5, 6, dtype=torch.bool)
    for n, nodes in enumerate([[0, 2, 4], [0, 2, 3], [0, 2, 3], [0, 2, 4], [0]]):
        starts[n, nodes] = True
    assert not steps[~starts & MASK].any()
    close(torch.where(starts, advantage(), 0.0).sum(1), REWARD - REWARD.mean())


def test_groups_are_told_apart():
    two = {name: torch.cat([t, t]) for name, t in TREE.items()} | {"group": GROUP.repeat(2)}
    two["group"][5:] = 1
    two["reward"] = torch.cat([REWARD, 1 - REWARD])
    told = advantage(mask=MASK.repeat(2, 1), **two)
    close(told, torch.cat([advantage(), advantage(1 - REWARD)]))


def test_groups_may_be_of_any_size_and_equal_rewards_give_exactly_nothing():
    keep = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    told = advantage(REWARD[keep], MASK[keep], group, PARENT[keep], BRANCH[keep])
    close(told[:5], advantage())
    same = torch.full((7,), 0.1, dtype=torch.float32)
    assert not advantage(same, MASK[keep], group, PARENT[keep], BRANCH[keep]).any()


# -- length -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0])
def test_longer_right_answers_lose_in_proportion_to_what_is_left_behind_the_shortest(power):
    common = common_tokens(LENGTH, GROUP, PARENT, BRANCH)
    plain = advantage()
    found = shortened(plain, REWARD, MASK, GROUP, common, power)
    # The shortest right answer is 2, of 4 tokens; 0 and 3, of 6, leave it behind the second.
    price = 1 - (2 / 4) ** power
    expected = plain.clone()
    for n in (0, 3):
        expected[n, 2:] -= plain[n, 2:].abs() * price
    close(found, expected)


def test_a_negative_advantage_of_a_long_right_answer_grows():
    reward = torch.tensor([1.0, 0.25], dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([[1], [4]])
    roots = torch.tensor([-1, -1]), torch.tensor([0, 0])
    common = common_tokens(mask.sum(1), GROUP[:2], *roots)
    found = shortened(advantage(reward, mask, GROUP[:2], *roots), reward, mask, GROUP[:2], common, 1.0)
    close(found[1], torch.full((4,), -0.375 * (2 - 1 / 4), dtype=torch.float64))


def test_wrong_answers_and_the_first_of_the_shortest_pay_nothing():
    common = common_tokens(LENGTH, GROUP, PARENT, BRANCH)
    found = shortened(advantage(), REWARD, MASK, GROUP, common, 2.0)
    close(found[[1, 2, 4]], advantage()[[1, 2, 4]])
    none = torch.zeros_like(REWARD)
    close(shortened(advantage(), none, MASK, GROUP, common, 2.0), advantage())


# -- the loss ---------------------------------------------------------------------------------------------

ROOTS = {"parent": torch.full((6,), -1), "branch": torch.zeros(6, dtype=torch.long)}
FLAT = torch.arange(5) < torch.tensor([5, 2, 3, 4, 1, 5]).unsqueeze(1)
REWARDS = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("aggregate", ["tokens", "sequences", 7], ids=repr)
@pytest.mark.parametrize("shared", ["each", "once"])
@pytest.mark.parametrize("estimator", [MonteCarlo(), MonteCarlo("behaviour")], ids=repr)
def test_without_a_branch_and_a_price_it_is_grpo_with_plain_advantages(aggregate, shared, estimator):
    own = {"divergence": JS(0.3), "estimator": estimator, "beta": 0.2, "clip": (0.1, 0.15)}
    flat = {"reward": REWARDS.flatten(), "group": torch.arange(6) // 3, **ROOTS}
    rose, gradient = update(ROSE(**own, length=0, shared=shared, aggregate=aggregate), FLAT, **flat)
    grpo, expected = update(GRPO(**own, advantage="mean", aggregate=aggregate), FLAT, rewards=REWARDS)
    close(rose.loss, grpo.loss)
    close(gradient, expected)
    for name in ("ratio", "clipped", "divergence"):
        close(rose.metrics[name], grpo.metrics[name])


def test_the_whole_vocabulary_can_be_penalised():
    full = {name: torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(n)).double().log_softmax(-1)
            for n, name in enumerate(("log_p", "log_q"))}  # fmt: skip
    policy = full["log_q"][..., 0]
    flat = {"reward": REWARD, "group": GROUP, "parent": torch.full((5,), -1), "branch": 0 * BRANCH}
    common = {"log_policy": policy, "log_behaviour": policy, "mask": MASK, **full}
    rose = ROSE(estimator=Exact(), length=0)(**common, **flat)
    grpo = GRPO(estimator=Exact(), beta=1e-3, advantage="mean")(**common, rewards=REWARD.unsqueeze(0))
    close(rose.loss, grpo.loss)


def test_on_policy_its_gradient_is_the_advantage_of_each_token():
    policy = tokens(5, 6, seed=0)
    out, gradient = update(ROSE(beta=0.0, length=0), behaviour=policy, **TREE)
    close(gradient, -advantage() / MASK.sum())
    close(out.metrics["branched"], torch.tensor(3 / 5, dtype=torch.float64))


def test_shared_tokens_count_in_each_answer_or_only_in_the_one_that_wrote_them():
    policy = tokens(5, 6, seed=0)
    _, gradient = update(ROSE(beta=0.1, shared="once", length=0), behaviour=policy, count=9.0, **TREE)
    own = MASK & (torch.arange(6) >= BRANCH.unsqueeze(1))
    assert own.sum() == MASK.sum() - BRANCH.sum()
    assert not gradient[~own].any() and gradient[own].all()
    _, gradient = update(ROSE(beta=0.0, shared="once", length=0), behaviour=policy, count=9.0, **TREE)
    close(gradient, torch.where(own, -advantage(), 0.0) / 9)
    _, gradient = update(ROSE(beta=0.0, shared="once", length=0), behaviour=policy, **TREE)
    close(gradient, torch.where(own, -advantage(), 0.0) / MASK.sum())  # as the trainer's count has it


def test_micro_batches_of_whole_groups_add_up():
    two = {name: torch.cat([t, t]) for name, t in TREE.items()}
    two |= {"group": torch.arange(10) // 5, "reward": torch.cat([REWARD, 1 - REWARD])}
    mask = torch.cat([MASK, MASK.flip(0)])
    mask[5:] = torch.arange(6) < LENGTH.unsqueeze(1)
    for method in (ROSE(beta=0.3), ROSE(beta=0.3, shared="once"), ROSE(beta=0.3, aggregate="sequences")):
        given = {"count": float(mask.sum()), "sequences": 10.0}
        log = [tokens(10, 6, seed=n) for n in range(3)]

        def part(rows, method=method, given=given, log=log):
            names = {name: t[rows] for name, t in two.items()}
            names["group"] = names["group"] - names["group"][0]
            policy, behaviour, reference = (t[rows] for t in log)
            return method(log_policy=policy, log_behaviour=behaviour, mask=mask[rows], log_p=reference,
                          log_q=policy, **names, **given).loss  # fmt: skip

        whole = part(slice(0, 10))
        close(part(slice(0, 5)) + part(slice(5, 10)), whole)


# -- at the edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", ["each", "once"])
def test_equal_rewards_empty_answers_and_far_ratios_stay_finite(shared):
    empty = MASK.clone()
    empty[4] = False  # an answer at the root without a token
    gone = torch.zeros_like(MASK)
    method = ROSE(beta=0.1, shared=shared)
    for mask in (MASK, empty, gone):
        for reward in (REWARD, torch.ones_like(REWARD), torch.zeros_like(REWARD), -REWARD):
            for far in (0.0, 1e4, -1e4, -torch.inf):
                policy = tokens(5, 6, seed=0).requires_grad_()
                reference = tokens(5, 6, seed=2)
                reference[0, 0] = far if far < 0 else -far
                behaviour = policy.detach() + torch.where(tokens(5, 6, seed=3) < -0.15, max(far, -1e4), 0.0)
                tree = TREE | {"reward": reward}
                out = method(log_policy=policy, log_behaviour=behaviour, mask=mask, log_p=reference,
                             log_q=policy, **tree)  # fmt: skip
                (gradient,) = torch.autograd.grad(out.loss, policy)
                assert out.loss.isfinite() and gradient.isfinite().all()
                assert not gradient[~mask].any()


def test_equal_rewards_move_nothing_without_a_price():
    out, gradient = update(ROSE(beta=0.0, length=0), **TREE | {"reward": torch.full((5,), 0.3)})
    assert out.loss == 0 and not gradient.any()


def test_masked_tokens_may_be_anything():
    for rubbish in (torch.nan, torch.inf, -torch.inf):
        policy = torch.where(MASK, tokens(5, 6, seed=0), rubbish).requires_grad_()
        out = ROSE(beta=0.0)(log_policy=policy, log_behaviour=policy.detach(), mask=MASK, **TREE)
        (gradient,) = torch.autograd.grad(out.loss, policy)
        assert out.loss.isfinite() and not gradient[~MASK].any() and gradient[MASK].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"length": -1}, "length is an exponent >= 0"),
        ({"shared": "never"}, "shared is 'each' or 'once'"),
        ({"branching": 0.5}, "branching is Branching"),
        ({"beta": -1.0}, "beta must be >= 0"),
        ({"clip": 2.0}, "clip is between 0 and 1"),
        ({"estimator": FusedLinear()}, "cannot see"),
        ({"aggregate": "words"}, "aggregate is"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, match):
    with pytest.raises((TypeError, ValueError), match=match):
        ROSE(**fields)


@pytest.mark.parametrize(
    ("tree", "match"),
    [
        ({"parent": torch.tensor([-1, 1, 1, 0, -1])}, "an earlier one"),
        ({"parent": torch.tensor([-1, 0, 1, 0, -2])}, "an earlier one"),
        ({"branch": torch.tensor([1, 2, 3, 4, 0])}, "without a parent"),
    ],
)
def test_a_tree_that_is_none_is_refused(tree, match):
    with pytest.raises(ValueError, match=match):
        update(ROSE(beta=0.0), **TREE | tree)


def test_it_is_a_method_and_says_what_it_reads():
    method = ROSE()
    assert isinstance(method, Method) and method.unit == "group" and method.divergence == ReverseKL()
    assert method.branching == Branching(first=1, epsilon=0.5)
    assert method.reads == ("reward", "group", "parent", "branch")
    assert ROSE(aggregate=8).reads[-1] == "sequences"
