"""Answers are drawn from the right distribution, each from its own numbers, however they are batched."""

import pytest
import torch

pytest.importorskip("transformers")
from tests.adapters import tiny
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from fdiv.adapters.generation import inverted
from fdiv.adapters.transformers import CausalLM
from fdiv.sample._sampler import Decoding
from fdiv.tasks.padding import NOTHING, answered, prompts_of, unanswered

STEPS = 7
DECODINGS = [Decoding(), Decoding(0.6), Decoding(top_k=3), Decoding(1.3, top_k=9, top_p=0.7), Decoding(0)]


def llama(seed=0, **options) -> CausalLM:
    return CausalLM(tiny.model(seed, **options), tokenizer=tiny.tokenizer())


def gpt2(seed=0) -> CausalLM:
    """Positions that are learned: a row that is shifted by padding would be read otherwise."""
    config = GPT2Config(
        vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.4, eos_token_id=1
    )
    torch.manual_seed(seed)
    return CausalLM(GPT2LMHeadModel(config).eval())


def gemma() -> CausalLM:
    """Logits that are more than hidden @ head.T."""
    config = Gemma2Config(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.4,
        max_position_embeddings=64,
        final_logit_softcapping=3.0,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return CausalLM(Gemma2ForCausalLM(config).eval())


def prompts(rows=9, seed=0):
    """Prompts of 1 to 6 tokens; the ids of padding and of the end of text occur, in the last place too."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 7, (rows,), generator=generator).tolist()
    found = [torch.randint(3, 24, (n,), generator=generator) for n in counts]
    found[1][-1], found[2][-1], found[3][0] = tiny.PAD, tiny.EOS, tiny.EOS
    return found


def draws(rows=9, steps=STEPS, seed=0):
    return torch.rand(rows, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(log_probs, prompt, uniform, ends):
    """One answer, from the whole text at each step; log_probs: ids [1, S] -> [vocab]."""
    ids, told = prompt.tolist(), []
    for u in uniform.tolist():
        p = log_probs(torch.tensor([ids])).double().exp()
        token = int((p.cumsum(0) <= u * p.sum()).sum())
        ids.append(token)
        told.append(p[token].log().item())
        if token in ends:
            break
    return ids, told


def last(model):
    """Log-probabilities of the token behind ids [1, S], by a pass over all of it."""
    return lambda ids: model.model(input_ids=ids).logits[0, -1].log_softmax(-1)


# -- one token ---------------------------------------------------------------------------------------------


def test_evenly_spaced_numbers_draw_each_token_as_often_as_it_is_likely():
    p = torch.tensor([0.5, 0.0, 0.125, 0.375], dtype=torch.float64)
    u = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    index = inverted(p.log().expand(800, -1), u)
    assert torch.bincount(index, minlength=4).tolist() == [400, 0, 100, 300]


@pytest.mark.parametrize("scale", [1.0, 1 + 1e-15, 1 - 1e-15, 0.3])
def test_the_largest_number_below_one_draws_the_last_token_that_has_probability(scale):
    p = scale * torch.tensor([[0.1, 0.2, 0.7, 0.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([1 - 2**-53, 0.0], dtype=torch.float64)
    assert inverted(p.log().expand(2, -1), u).tolist() == [2, 0]
    assert inverted(torch.tensor([[-torch.inf, 0.0]]).double(), torch.zeros(1)).tolist() == [1]


# -- whole answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2, gemma])
def test_answers_are_those_of_the_whole_text_read_at_each_step(make):
    model, u = make(), draws()
    text, log_probs = model.generate_with_log_probs(unanswered(prompts()), u)
    told = iter(log_probs.split(text.mask.sum(1).tolist()))
    for row, mask, prompt, uniform in zip(*text, prompts(), u, strict=True):
        with torch.no_grad():
            ids, wanted = by_hand(last(model), prompt, uniform, {tiny.EOS})
        assert row[: len(ids)].tolist() == ids
        assert mask.nonzero().flatten().tolist() == list(range(len(prompt), len(ids)))
        torch.testing.assert_close(next(told), torch.tensor(wanted), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("decoding", DECODINGS, ids=repr)
def test_an_answer_is_the_same_alone_in_another_batch_and_in_another_order(make, decoding):
    model, u, some = make(), draws(), prompts()
    whole = model.generate(unanswered(some), u, decoding)
    order = torch.randperm(len(some), generator=torch.Generator().manual_seed(1)).tolist()
    for batch in ([[i] for i in range(len(some))], [order[:4], order[4:]]):
        for rows in batch:
            part = model.generate(unanswered([some[i] for i in rows]), u[rows], decoding)
            for n, i in enumerate(rows):
                assert part.ids[n][part.mask[n]].tolist() == whole.ids[i][whole.mask[i]].tolist()


def test_the_end_of_text_is_the_last_token_of_the_response_and_nothing_follows():
    text = llama().generate(unanswered(prompts() * 8), draws(72, 12, seed=3))
    ended = 0
    for ids, mask, prompt in zip(*text, prompts() * 8, strict=True):
        response = ids[mask].tolist()
        assert ids[: len(prompt)].tolist() == prompt.tolist() and not mask[: len(prompt)].any()
        assert tiny.EOS not in response[:-1]
        ended += response[-1] == tiny.EOS
        assert len(response) == 12 or response[-1] == tiny.EOS
        assert mask.sum() == len(response) and not mask[len(prompt) + len(response) :].any()
    assert 5 < ended < 72  # both kinds were seen


def test_ends_that_are_given_stop_the_answer_and_those_of_the_model_then_do_not():
    model, u = llama(), draws(9, 20)
    free = model.generate(unanswered(prompts()), u, ends=())
    assert free.mask.sum(1).tolist() == [20] * 9
    stop = int(free.ids[free.mask].mode().values)
    for ids, mask, whole in zip(
        *model.generate(unanswered(prompts()), u, ends=(stop,)), free.ids, strict=True
    ):
        response, all_of_it = ids[mask].tolist(), whole[whole != NOTHING].tolist()
        begin = int(mask.int().argmax())
        assert all_of_it[begin : begin + len(response)] == response
        assert stop not in response[:-1] and (len(response) == 20 or response[-1] == stop)


def test_fixed_length_samples_are_the_answers_without_ends():
    model, u = llama(), draws()
    ids = torch.randint(3, 24, (9, 4), generator=torch.Generator().manual_seed(2))
    for decoding in DECODINGS:
        text = model.generate(unanswered(list(ids)), u, decoding, ends=())
        assert model.sample(ids, STEPS, draws=u, decoding=decoding).equal(text.ids)
    generator = torch.Generator().manual_seed(0)
    assert model.sample(ids, STEPS, generator).equal(model.sample(ids, STEPS, draws=u))
    assert model.sample(ids, STEPS).equal(model.sample(ids, STEPS, draws=u, decoding=Decoding(0)))


def test_greedy_answers_are_those_of_transformers():
    model, prompt = llama(), prompts()[0]
    text, log_probs = model.generate_with_log_probs(unanswered([prompt]), draws(1), Decoding(temperature=0))
    theirs = model.model.generate(prompt[None], do_sample=False, max_new_tokens=STEPS, pad_token_id=0)
    assert text.ids.tolist() == theirs.tolist()
    assert not log_probs.any()  # a greedy choice is certain


def test_the_options_that_a_model_was_published_with_change_nothing_and_are_kept():
    model, u = llama(), draws()
    plain = model.generate(unanswered(prompts()), u)
    published = model.model.generation_config
    published.update(repetition_penalty=50.0, top_k=1, temperature=0.1, do_sample=True, min_new_tokens=7)
    model.model.train()
    again = model.generate(unanswered(prompts()), u)
    assert again.ids.equal(plain.ids) and again.mask.equal(plain.mask)
    assert model.model.generation_config is published and model.model.training


# -- what is drawn from ------------------------------------------------------------------------------------


def nucleus(log_probs, decoding):
    """The distribution of one row, from its definition."""
    p = (log_probs.double() / decoding.temperature).softmax(0)
    order = p.argsort(descending=True)
    kept = order[: decoding.top_k or len(p)]
    q = torch.zeros_like(p).index_copy(0, kept, p[kept])
    q = q / q.sum()
    before = q[order].cumsum(0) - q[order]
    q[order[before >= decoding.top_p]] = 0
    return (q / q.sum()).log()


@pytest.mark.parametrize("decoding", DECODINGS[:-1], ids=repr)
def test_tokens_come_from_the_tempered_and_truncated_distribution(decoding):
    model, u, some = llama(), draws(), prompts()
    text, log_probs = model.generate_with_log_probs(unanswered(some), u, decoding)
    torch.testing.assert_close(model.drawn_log_probs(*text, decoding), log_probs, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        ids, told = by_hand(lambda i: nucleus(last(model)(i), decoding), some[0], u[0], {tiny.EOS})
    assert text.ids[0][: len(ids)].tolist() == ids
    torch.testing.assert_close(log_probs[: len(told)], torch.tensor(told), atol=1e-5, rtol=1e-5)


def test_at_temperature_one_the_log_probability_is_the_models_own():
    model = llama()
    text, log_probs = model.generate_with_log_probs(unanswered(prompts()), draws())
    with torch.no_grad():
        torch.testing.assert_close(log_probs, model.token_log_probs(*text), atol=1e-5, rtol=1e-5)


def test_a_restricted_vocabulary_is_the_conditional_distribution_here_too():
    whole, kept = llama(), torch.tensor([1, 4, 5, 9, 17, 22])
    restricted = CausalLM(whole.model, kept, whole.tokenizer)
    text, log_probs = restricted.generate_with_log_probs(unanswered(prompts()), draws())
    assert torch.isin(text.ids[text.mask], kept).all()
    with torch.no_grad():
        rows = whole.log_softmax(*text)
    wanted = whole.token_log_probs(*text) - rows[:, kept].logsumexp(-1)
    torch.testing.assert_close(log_probs, wanted.detach(), atol=1e-5, rtol=1e-5)


def test_rows_that_fill_up_a_head_are_in_no_distribution():
    model = llama()
    padded = CausalLM(llama().model, tokenizer=model.tokenizer)
    padded.model.resize_token_embeddings(32, mean_resizing=False)
    with torch.no_grad():
        padded.model.lm_head.weight[24:] = 5 * padded.model.lm_head.weight[3:11]  # likely, were they tokens
    assert (padded.rows, padded.true_size, len(padded.head), model.true_size) == (32, 24, 24, 24)
    text = padded.generate(unanswered(prompts()), draws())
    wanted = model.generate(unanswered(prompts()), draws())
    assert text.ids.equal(wanted.ids)
    torch.testing.assert_close(padded.log_softmax(*text), model.log_softmax(*text))
    assert CausalLM(padded.model).true_size == 32  # nothing tells which rows are tokens
    capped = gemma()
    capped.tokenizer = tiny.tokenizer()
    capped.model.resize_token_embeddings(32, mean_resizing=False)
    assert capped.log_softmax(*text).shape[1] == 24


# -- two writers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_mixture_draws_from_the_weighted_mean_of_both(make):
    student, teacher, u, a = make(0), make(1), draws(), 0.3
    writer = student.mixed_with(teacher, a)
    text, log_probs = writer.generate_with_log_probs(unanswered(prompts()), u)

    def mixed(ids):
        return (a * last(teacher)(ids).exp() + (1 - a) * last(student)(ids).exp()).log()

    told = iter(log_probs.split(text.mask.sum(1).tolist()))
    for row, prompt, uniform in zip(text.ids, prompts(), u, strict=True):
        with torch.no_grad():
            ids, wanted = by_hand(mixed, prompt, uniform, {tiny.EOS})
        assert row[: len(ids)].tolist() == ids
        torch.testing.assert_close(next(told), torch.tensor(wanted), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(writer.drawn_log_probs(*text), log_probs, atol=1e-5, rtol=1e-5)


def test_the_weight_of_a_token_of_the_mixture_is_bounded():
    student, teacher, a = llama(0), llama(1), 0.2
    text, log_probs = student.mixed_with(teacher, a).generate_with_log_probs(unanswered(prompts()), draws())
    with torch.no_grad():
        weight = (student.token_log_probs(*text) - log_probs).exp()
    assert weight.max() <= 1 / (1 - a) + 1e-4


def test_at_its_ends_the_mixture_is_one_of_the_models():
    student, teacher, u, some = llama(0), llama(1), draws(), unanswered(prompts())
    for decoding in (Decoding(), Decoding(0.7, top_k=4)):
        assert (
            student.mixed_with(teacher, 0)
            .generate(some, u, decoding)
            .ids.equal(student.generate(some, u, decoding).ids)
        )
        assert (
            student.mixed_with(teacher, 1)
            .generate(some, u, decoding)
            .ids.equal(teacher.generate(some, u, decoding).ids)
        )
    fixed = torch.full((9, 2), 5)
    writer = student.mixed_with(teacher, 0.5)
    text = writer.generate(unanswered(list(fixed)), u, ends=())
    assert writer.sample(fixed, STEPS, draws=u).equal(text.ids)


# -- padding, and what is refused --------------------------------------------------------------------------


def test_prompts_are_found_again_in_what_was_answered():
    some = prompts()
    text = llama().generate(unanswered(some), draws())
    again = prompts_of(text)
    assert again.ids.equal(unanswered(some).ids) and not again.mask.any()


def test_what_cannot_be_answered_is_refused_with_what_to_write():
    model, u = llama(), draws(2)
    some = unanswered(prompts()[:2])
    with pytest.raises(ValueError, match="padded on the right"):
        model.generate(some._replace(ids=some.ids.flip(1)), u)
    with pytest.raises(ValueError, match="a prompt has no token"):
        model.generate(unanswered([torch.tensor([4]), torch.tensor([], dtype=torch.long)]), u)
    with pytest.raises(ValueError, match=r"2 answers of 7 tokens need as many draws, got \(3, 7\)"):
        model.generate(some, draws(3))
    with pytest.raises(ValueError, match=r"uniform numbers in \[0, 1\)"):
        model.generate(some, u + 1)
    with pytest.raises(ValueError, match="the model has 64 positions"):
        model.generate(some, draws(2, 64))
    with pytest.raises(ValueError, match="no greedy answer"):
        model.mixed_with(llama(1), 0.5).generate(some, u, Decoding(temperature=0))
    with pytest.raises(ValueError, match="fraction between 0 and 1, got 2"):
        model.mixed_with(model, 2)
    with pytest.raises(ValueError, match="share them"):
        model.mixed_with(CausalLM(model.model, torch.tensor([1, 2])), 0.5)
    with pytest.raises(ValueError, match="not both"):
        model.sample(torch.tensor([[4]]), STEPS, torch.Generator(), draws=u[:1])


def test_rows_that_are_padded_on_the_left_are_refused_where_they_can_be_seen():
    model = llama()
    text = answered([torch.tensor([5, 6])], [torch.tensor([7])], tiny.PAD)
    ids, mask = torch.tensor([[tiny.PAD, 5, 6, 7]]), torch.tensor([[False, False, False, True]])
    model.hidden(*text)
    for read in (model.hidden, model.log_softmax, model.token_log_probs):
        with pytest.raises(ValueError, match=r"rows begin with padding \(id 0\)"):
            read(ids, mask)
