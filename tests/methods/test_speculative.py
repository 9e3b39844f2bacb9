"""Speculative decoding: the text's law is the target's, enumerated over every decision the code can take."""

from itertools import product

import pytest
import torch
from tests.worlds import close, random_rows

import fdiv
from fdiv.methods.decode.draws import Draws
from fdiv.methods.decode.speculative import Speculative
from fdiv.methods.decode.verdict import Ensemble, Lenient, Lossless, Typical, Verdict
from fdiv.methods.decode.warp import warped
from fdiv.sample._sampler import Decoding

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
Q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
VERDICTS = (
    Lossless(),
    Lenient(0.5),
    Lenient(0.5, "lenient"),
    Ensemble(0.3),
    Ensemble(0.8),
    Typical(0.3),
    Typical(0.7),
)
each_verdict = pytest.mark.parametrize("verdict", VERDICTS, ids=repr)


# -- worlds in which everything that can happen is known ---------------------------------------------------


class Scripted:
    """Decisions read from a script, then always the first possible one; with the probability of them all."""

    def __init__(self, script):
        self.script, self.taken, self.probability = script, [], 1.0

    def decide(self, chances):
        possible = [i for i, chance in enumerate(chances) if chance > 0]
        place = self.script[len(self.taken)] if len(self.taken) < len(self.script) else 0
        self.taken.append((place, len(possible)))
        self.probability *= chances[possible[place]]
        return possible[place]

    def coin(self, chance):
        return bool(self.decide([1 - chance, chance]))

    def token(self, mass):
        return self.decide((mass / mass.sum()).tolist())

    def following(self):
        """The next script in the order of all, or None."""
        taken = list(self.taken)
        while taken:
            place, possible = taken.pop()
            if place + 1 < possible:
                return [p for p, _ in taken] + [place + 1]
        return None


def every_run(program):
    """(probability, result) of program(draws) for every sequence of decisions."""
    script = []
    while script is not None:
        draws = Scripted(script)
        result = program(draws)
        yield draws.probability, result
        script = draws.following()


def table_reader(seed, symbols, longest=8, scale=1.5):
    """A model whose law depends on the whole text: a random row for each one's number (bijective
    numeration)."""
    rows = random_rows(2 * symbols**longest, symbols, seed, scale)

    def reader(ids, last):
        ends = range(len(ids) - last + 1, len(ids) + 1)
        numbers = [sum((int(t) + 1) * symbols**i for i, t in enumerate(ids[1:end])) for end in ends]
        return rows[torch.tensor(numbers)]

    return reader


def constant_reader(law):
    return lambda ids, last: law.log().expand(last, -1)


def law_of_text(reader, length, symbols, decoding=None):
    """p(y) of each text of `length` tokens after [0], by the chain rule."""
    law = {}
    for tokens in product(range(symbols), repeat=length):
        ids = torch.tensor([0, *tokens])
        rows = warped(reader(ids[:-1], length), decoding or Decoding())
        law[tokens] = rows[torch.arange(length), ids[1:]].sum().exp().item()
    return law


def law_of_runs(speculative, target, draft, length, symbols):
    law = dict.fromkeys(product(range(symbols), repeat=length), 0.0)
    prompt = torch.tensor([0])
    for probability, out in every_run(lambda draws: speculative.write(target, draft, prompt, length, draws)):
        law[tuple(out.ids[1:].tolist())] += probability
    return law


def vector(law):
    return torch.tensor([law[key] for key in sorted(law)], dtype=torch.float64)


# -- the text is the target's ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft_tokens", "length", "symbols"), [(1, 1, 3), (1, 3, 3), (2, 2, 3), (2, 3, 3), (4, 3, 2), (4, 3, 3)]
)
def test_the_law_of_the_first_tokens_is_the_targets(draft_tokens, length, symbols):
    target, draft = table_reader(1, symbols), table_reader(2, symbols)
    found = law_of_runs(Speculative(draft_tokens), target, draft, length, symbols)
    close(vector(found), vector(law_of_text(target, length, symbols)), 1e-13)
    close(vector(found).sum(), torch.tensor(1.0, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("decoding", [Decoding(0.5), Decoding(1.3, top_k=2), Decoding(top_p=0.6)], ids=repr)
def test_temperature_and_truncation_are_those_of_both_models(decoding):
    target, draft = table_reader(1, 3), table_reader(2, 3)
    found = law_of_runs(Speculative(2, decoding=decoding), target, draft, 2, 3)
    close(vector(found), vector(law_of_text(target, 2, 3, decoding)), 1e-13)


def test_at_temperature_0_it_is_the_targets_greedy_text_and_a_draft_is_kept_where_they_agree():
    target, draft = table_reader(1, 3), table_reader(2, 3)
    generator = torch.Generator().manual_seed(0)
    speculative = Speculative(3, decoding=Decoding(temperature=0.0))
    out = speculative(target, draft, torch.tensor([0]), 6, generator)
    ids = torch.tensor([0])
    for _ in range(6):
        ids = torch.cat([ids, target(ids, 1).argmax(-1)])
    assert torch.equal(out.ids, ids)
    assert out.chance == out.kept  # each acceptance is 0 or 1
    assert 0 < out.kept < out.judged


def test_a_draft_on_other_tokens_than_the_targets_does_not_bend_its_law():
    """q(x) = 0 where p has mass, and the reverse: nothing is divided by 0."""
    target = constant_reader(torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64))
    for draft in ([0.0, 0.3, 0.7, 0.0], [0.0, 0.0, 0.4, 0.6]):
        reader = constant_reader(torch.tensor(draft, dtype=torch.float64))
        found = law_of_runs(Speculative(2), target, reader, 2, 4)
        close(vector(found), vector(law_of_text(target, 2, 4)), 1e-14)


@each_verdict
def test_a_draft_equal_to_the_target_is_always_kept_unless_it_is_not_typical(verdict):
    reader = table_reader(3, 3)
    speculative = Speculative(3, verdict)
    for probability, block in every_run(
        lambda draws: speculative.block(reader, reader, torch.tensor([0]), 4, draws)
    ):
        if not isinstance(verdict, Typical):
            assert block.kept == block.judged == 3 and len(block.tokens) == 4
        assert probability > 0


@pytest.mark.parametrize("verdict", [v for v in VERDICTS if not isinstance(v, Typical)], ids=repr)
def test_the_closed_forms_hold_where_nothing_is_left_over(verdict):
    log_p = random_rows(5, 4)
    speculative = Speculative(verdict=verdict)
    close(speculative.law(log_p, log_p), log_p.exp(), 1e-14)
    close(speculative.acceptance(log_p, log_p), torch.ones(5).double(), 1e-14)


# -- how much is kept --------------------------------------------------------------------------------------


def test_acceptance_is_1_less_the_total_variation():
    log_p, log_q = random_rows(200, 11, 0), random_rows(200, 11, 1)
    close(Speculative().acceptance(log_p, log_q), 1 - fdiv.TV()(log_p, log_q), 1e-14)


@pytest.mark.parametrize("weight", [0.1, 0.5, 1.0])
def test_an_ensemble_writes_the_mixture_and_keeps_1_less_weight_times_the_total_variation(weight):
    log_p, log_q = random_rows(200, 11, 0), random_rows(200, 11, 1)
    speculative = Speculative(verdict=Ensemble(weight))
    close(speculative.law(log_p, log_q), weight * log_p.exp() + (1 - weight) * log_q.exp(), 1e-14)
    close(speculative.acceptance(log_p, log_q), 1 - weight * fdiv.TV()(log_p, log_q), 1e-14)


@pytest.mark.parametrize(("draft_tokens", "length"), [(1, 2), (1, 3), (2, 3)])
def test_a_whole_text_of_an_ensemble_has_the_law_of_the_mixture_the_bonus_token_included(
    draft_tokens, length
):
    target, draft = table_reader(1, 2), table_reader(2, 2)

    def mixture(ids, last):
        return torch.lerp(draft(ids, last).exp(), target(ids, last).exp(), 0.3).log()

    found = law_of_runs(Speculative(draft_tokens, Ensemble(0.3)), target, draft, length, 2)
    close(vector(found), vector(law_of_text(mixture, length, 2)), 1e-13)


@each_verdict
def test_what_the_code_writes_has_the_law_and_the_acceptance_of_the_closed_form(verdict):
    speculative = Speculative(1, verdict)
    law, kept = torch.zeros(3, dtype=torch.float64), 0.0
    target, draft = constant_reader(P), constant_reader(Q)
    for probability, block in every_run(
        lambda draws: speculative.block(target, draft, torch.tensor([0]), 2, draws)
    ):
        law[block.tokens[0]] += probability
        kept += probability * block.kept
        assert block.judged == 1
        assert block.chance == pytest.approx(speculative.acceptance(P.log(), Q.log()).item(), abs=1e-15)
    close(law, speculative.law(P.log(), Q.log()), 1e-14)
    close(torch.tensor(kept, dtype=torch.float64), speculative.acceptance(P.log(), Q.log()), 1e-14)


def test_the_worked_numbers():
    one = (P.log(), Q.log())
    assert Speculative().acceptance(*one).item() == pytest.approx(0.6, abs=1e-15)
    close(Lossless().residual(P, Q) / Lossless().residual(P, Q).sum(), torch.eye(3).double()[0], 1e-15)
    assert Speculative(verdict=Lenient(0.5)).acceptance(*one).item() == pytest.approx(0.7, abs=1e-15)
    # The two residuals of one acceptance: 0.3 goes to the first token, or is shared as 1.0 to 0.3.
    target = torch.tensor([0.2 + 0.3, 0.3, 0.2], dtype=torch.float64)
    lenient = torch.tensor([0.2 + 0.3 / 1.3, 0.3 + 0.09 / 1.3, 0.2], dtype=torch.float64)
    close(Speculative(verdict=Lenient(0.5)).law(*one), target, 1e-14)
    close(Speculative(verdict=Lenient(0.5, "lenient")).law(*one), lenient, 1e-14)


def test_typical_keeps_what_is_likelier_than_the_smaller_threshold():
    """H(p) = .897946: the threshold is min(.09, .3 e^-H = .122222) = .09, or .49 at .7 (.285184)."""
    log = (P.log(), Q.log())
    assert Speculative(verdict=Typical(0.3)).acceptance(*log).item() == pytest.approx(1.0)
    # .7 e^-H = .285184 < .49: the third token goes.
    assert Speculative(verdict=Typical(0.7)).acceptance(*log).item() == pytest.approx(0.5)
    close(Speculative(verdict=Typical(0.7)).law(*log), Q * torch.tensor([1, 1, 0]) + 0.5 * P, 1e-14)


def test_leniency_1_and_weight_1_are_lossless():
    log_p, log_q = random_rows(50, 7, 0), random_rows(50, 7, 1)
    for verdict in (Lossless(), Lenient(1.0), Lenient(1.0, "lenient"), Ensemble(1.0)):
        speculative = Speculative(verdict=verdict)
        close(speculative.law(log_p, log_q), log_p.exp(), 1e-14)
        close(speculative.acceptance(log_p, log_q), 1 - fdiv.TV()(log_p, log_q), 1e-14)


def test_more_leniency_keeps_more():
    log_p, log_q = random_rows(50, 7, 0), random_rows(50, 7, 1)
    kept = [Speculative(verdict=Lenient(e)).acceptance(log_p, log_q) for e in (1.0, 0.5, 0.25)]
    assert (kept[0] < kept[1]).all() and (kept[1] < kept[2]).all()


@pytest.mark.parametrize("draft_tokens", [1, 2, 4])
def test_the_mean_length_of_a_block_is_the_geometric_sum(draft_tokens):
    """a = 0.6 at every token: (1 - a^(g+1)) / (1 - a) tokens a call."""
    speculative, mean = Speculative(draft_tokens), 0.0
    target, draft = constant_reader(P), constant_reader(Q)
    for probability, block in every_run(
        lambda draws: speculative.block(target, draft, torch.tensor([0]), draft_tokens + 1, draws)
    ):
        mean += probability * len(block.tokens)
        assert len(block.tokens) == block.kept + 1
    assert mean == pytest.approx((1 - 0.6 ** (draft_tokens + 1)) / 0.4, abs=1e-12)
    assert mean == pytest.approx(speculative.tokens_per_call(0.6), abs=1e-12)


def test_tokens_per_call_at_both_ends_and_between():
    speculative = Speculative(draft_tokens=4)
    assert speculative.tokens_per_call(0.8) == pytest.approx(3.3616, abs=1e-12)
    assert speculative.tokens_per_call(0.0) == 1
    assert speculative.tokens_per_call(1.0) == 5
    assert speculative.speedup(0.8, cost=0.05) == pytest.approx(3.3616 / 1.2, abs=1e-12)


# -- the real thing ----------------------------------------------------------------------------------------


def test_the_counts_add_up_and_the_same_generator_writes_the_same_text():
    target, draft = table_reader(1, 3, longest=10), table_reader(2, 3, longest=10)
    texts = []
    for _ in range(2):
        out = Speculative(3)(target, draft, torch.tensor([0]), 9, torch.Generator().manual_seed(5))
        texts.append(out.ids)
        assert out.written == 9 and len(out.ids) == 10 and out.ids[0] == 0
        # Each call gives its kept drafts and one token of the target.
        assert out.written == out.kept + out.calls
        assert out.tokens_per_call == out.written / out.calls
        assert out.acceptance == out.kept / out.judged
    assert torch.equal(*texts)


def test_drafts_are_kept_as_often_as_the_closed_form_says():
    generator, count = torch.Generator().manual_seed(0), 2000
    target, draft = constant_reader(P), constant_reader(Q)
    out = Speculative(3)(target, draft, torch.tensor([0]), count, generator)
    spread = (0.6 * 0.4 / out.judged) ** 0.5
    assert abs(out.acceptance - 0.6) < 4 * spread
    assert out.chance == pytest.approx(0.6 * out.judged)
    assert out.tokens_per_call == pytest.approx(Speculative(3).tokens_per_call(0.6), rel=0.05)


@pytest.mark.parametrize("level", [0.0, 0.5, 1 - 2**-53])
def test_a_token_without_mass_is_never_drawn(level):
    class Fixed(Draws):
        def uniform(self):
            return level

    generator = torch.Generator().manual_seed(0)
    for row in range(100):
        mass = torch.rand(9, generator=generator, dtype=torch.float64)
        mass[[0, 4, 8]] = 0
        assert mass[Fixed(generator).token(mass)] > 0, row


def test_uniform_numbers_have_more_digits_than_float32():
    draws = Draws(torch.Generator().manual_seed(0))
    numbers = torch.tensor([draws.uniform() for _ in range(20)], dtype=torch.float64)
    assert (numbers != numbers.float().double()).all()


def test_a_text_is_over_with_an_end_whoever_wrote_it():
    target, draft = constant_reader(P), constant_reader(Q)
    generator, ends = torch.Generator().manual_seed(0), 0
    for _ in range(50):
        out = Speculative(3)(target, draft, torch.tensor([0]), 12, generator, ends=(2,))
        tokens = out.ids[1:].tolist()
        assert 2 not in tokens[:-1]
        assert tokens[-1] == 2 or len(tokens) == 12
        ends += tokens[-1] == 2
    assert ends > 10


def test_ends_do_not_bend_the_law():
    """The first token is an end with probability p."""
    target, draft, found = table_reader(1, 3), table_reader(2, 3), 0.0
    for probability, out in every_run(
        lambda draws: Speculative(2).write(target, draft, torch.tensor([0]), 2, draws, ends=(1,))
    ):
        found += probability * (out.written == 1)
    assert found == pytest.approx(target(torch.tensor([0]), 1)[0, 1].exp().item(), abs=1e-14)


def test_warped_keeps_the_k_likeliest_with_their_equals_and_the_least_set_that_holds_the_mass():
    rows = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64).log()
    close(warped(rows, Decoding(top_k=2)).exp()[0], torch.tensor([0, 4 / 7, 0, 3 / 7]).double(), 1e-7)
    assert (warped(rows, Decoding(top_k=2)).exp() > 0).sum(-1).tolist() == [2, 4]
    assert (warped(rows, Decoding(top_p=0.7 - 1e-9)).exp() > 0).sum(-1).tolist() == [2, 3]
    assert (warped(rows, Decoding(top_p=0.7 + 1e-9)).exp() > 0).sum(-1).tolist() == [3, 3]
    assert warped(rows, Decoding(0.0)).exp()[1].tolist() == [1, 0, 0, 0]
    close(warped(rows, Decoding(0.5)).exp()[0], torch.tensor([1, 16, 4, 9]).double() / 30, 1e-14)
    close(warped(rows, Decoding(top_k=9)), rows, 1e-14)


def test_what_makes_no_sense_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="draft_tokens"):
        Speculative(0)
    with pytest.raises(TypeError, match=r"verdict is Lossless\(\)"):
        Speculative(verdict="typical")
    with pytest.raises(ValueError, match="lenience is in"):
        Lenient(0.0)
    with pytest.raises(ValueError, match="'target' or 'lenient'"):
        Lenient(0.5, "draft")
    with pytest.raises(ValueError, match="weight is the target's"):
        Ensemble(0.0)
    with pytest.raises(ValueError, match="epsilon"):
        Typical(1.0)
    generator = torch.Generator()
    wide = constant_reader(torch.full((4,), 0.25, dtype=torch.float64))
    with pytest.raises(ValueError, match="3 and 4 tokens"):
        Speculative()(constant_reader(P), wide, torch.tensor([0]), 5, generator)
    with pytest.raises(ValueError, match="length >= 1"):
        Speculative()(wide, wide, torch.tensor([0]), 0, generator)


@each_verdict
def test_the_object_is_its_recipe(verdict):
    speculative = Speculative(2, verdict, Decoding(0.7, top_k=20))
    assert fdiv.parse(repr(speculative)) == speculative
    assert hash(speculative) == hash(fdiv.parse(repr(speculative)))
    assert isinstance(verdict, Verdict)
