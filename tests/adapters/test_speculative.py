"""Speculative decoding with transformers' models: the same text as without caches, and the target's law."""

import pytest
import torch
from tests.adapters.tiny import EOS
from tests.adapters.tiny import model as tiny
from tests.worlds import close, random_rows
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fdiv
from fdiv.adapters.generation import decoded
from fdiv.adapters.speculative import Cached, speculate
from fdiv.adapters.transformers import CausalLM
from fdiv.methods.decode.speculative import Speculative
from fdiv.methods.decode.verdict import Ensemble
from fdiv.methods.decode.warp import warped
from fdiv.sample._sampler import Decoding


def fresh(seed, symbols=7, scale=8.0):
    """A model of random weights whose laws are far from uniform."""
    model = CausalLM.fresh(symbols, hidden_size=16, layers=2, heads=2, seed=seed)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(scale)
    model.model.eval()
    return model


def windowed(seed, window=4):
    """A model that attends to its last few tokens only."""
    config = MistralConfig(
        vocab_size=7,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        sliding_window=window,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CausalLM(MistralForCausalLM(config).eval())


def uncached(model):
    """A reader that reads the whole text again each time."""

    def reader(ids, last):
        ids = torch.cat([ids, ids[:1]]).unsqueeze(0)  # CausalLM predicts tokens that are there
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, -last:] = True
        with torch.no_grad():
            return model.log_softmax(ids, mask)

    return reader


PROMPT = torch.tensor([0, 3, 1])


@pytest.mark.parametrize("make", [fresh, windowed])
def test_a_cache_that_is_taken_back_says_what_reading_anew_says(make):
    """Texts that grow, are cut and go on otherwise, beyond the window of the second model too."""
    model = make(1)
    cached, anew = Cached(model), uncached(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0])
    for _ in range(30):
        keep = max(1, len(ids) - int(torch.randint(0, 4, (), generator=generator)))
        more = torch.randint(0, 7, (int(torch.randint(1, 5, (), generator=generator)),), generator=generator)
        ids = torch.cat([ids[:keep], more])
        last = int(torch.randint(1, 1 + min(3, len(ids)), (), generator=generator))
        torch.testing.assert_close(cached(ids, last), anew(ids, last), rtol=0, atol=2e-5)
    assert len(ids) > 12


def test_each_token_is_read_once_by_either_model():
    """The target: the prompt, all drafts and each token of its own but the last."""
    target, draft, read = fresh(1), fresh(2), {"target": [], "draft": []}
    for name, model in (("target", target), ("draft", draft)):

        def hook(module, arguments, options, name=name):
            read[name].append(options["input_ids"].numel())

        model.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    out = speculate(target, draft, PROMPT, 20, torch.Generator().manual_seed(0), Speculative(3))
    drafted = len(read["draft"])
    assert 0 < out.kept < out.judged < drafted
    assert len(read["target"]) == out.calls
    assert sum(read["target"]) == len(PROMPT) + drafted + out.calls - 1
    # A draft that was kept whole has not been read to its end; its last token comes with the next.
    assert read["draft"][0] == len(PROMPT) and set(read["draft"][1:]) == {1, 2}
    assert sum(read["draft"]) <= len(PROMPT) + drafted + out.calls


def test_the_text_is_that_of_readers_without_a_cache():
    target, draft = fresh(1), fresh(2)
    for method in (Speculative(3), Speculative(2, Ensemble(0.5), Decoding(0.8, top_p=0.9))):
        for seed in range(5):
            generators = [torch.Generator().manual_seed(seed) for _ in range(2)]
            out = speculate(target, draft, PROMPT, 12, generators[0], method)
            expected = method(uncached(target), uncached(draft), PROMPT, 12, generators[1])
            assert torch.equal(out.ids, expected.ids)
            assert out[1:5] == expected[1:5]
            assert out.chance == pytest.approx(expected.chance, abs=1e-4)


def test_greedily_it_writes_the_targets_greedy_text():
    target, draft = fresh(1), fresh(2)
    method = Speculative(4, decoding=Decoding(temperature=0.0))
    out = speculate(target, draft, PROMPT, 15, torch.Generator(), method)
    assert torch.equal(out.ids, target.sample(PROMPT.unsqueeze(0), 15)[0])


def test_drafts_are_kept_as_often_as_1_less_the_total_variation():
    """A binomial count, four deviations wide: one judged draft a text, always after the same prompt."""
    target, draft, runs = fresh(1), fresh(2), 200
    log_p, log_q = (uncached(m)(PROMPT, 1).double() for m in (target, draft))
    expected = 1 - fdiv.TV()(log_p, log_q).item()
    assert 0.2 < expected < 0.8
    generator = torch.Generator().manual_seed(0)
    outs = [speculate(target, draft, PROMPT, 2, generator, Speculative(1)) for _ in range(runs)]
    assert all(out.judged == 1 for out in outs)
    kept = sum(out.kept for out in outs)
    assert abs(kept - runs * expected) < 4 * (runs * expected * (1 - expected)) ** 0.5
    assert outs[0].chance == pytest.approx(expected, abs=1e-5)


def test_in_a_long_text_the_kept_drafts_follow_the_closed_form_at_each_place():
    """Kept less its chance is a martingale, whose variance is at most a quarter a draft."""
    target, draft = fresh(1), fresh(2)
    method, generator = Speculative(3), torch.Generator().manual_seed(1)
    outs = [speculate(target, draft, PROMPT, 50, generator, method) for _ in range(4)]
    kept, judged, chance = (sum(getattr(out, name) for out in outs) for name in ("kept", "judged", "chance"))
    assert judged > 100
    assert abs(kept - chance) < 4 * (judged / 4) ** 0.5


def test_the_law_is_that_of_transformers_assisted_generation():
    """The first two tokens of either, against the target's own law, by Pearson's statistic."""
    target, draft, runs = fresh(1, symbols=3), fresh(2, symbols=3), 200
    prompt = PROMPT % 3
    texts = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    whole = torch.cat([prompt.expand(9, -1), texts], 1)
    mask = torch.zeros_like(whole, dtype=torch.bool)
    mask[:, len(prompt) :] = True
    with torch.no_grad():
        law = target.token_log_probs(whole, mask).reshape(9, 2).sum(1).exp()
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(2, 9)
    method = Speculative(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(runs):
            ours = speculate(target, draft, prompt, 2, generator, method).ids[-2:]
            theirs = target.model.generate(
                prompt.unsqueeze(0),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                assistant_model=draft.model,
                do_sample=True,
                top_k=0,
                max_new_tokens=2,
            )[0, -2:]
            for row, (a, b) in enumerate((ours, theirs)):
                counts[row, 3 * a + b] += 1
    statistic = ((counts - runs * law) ** 2 / (runs * law)).sum(1)
    assert (statistic < 31.8).all()  # the 1e-4 quantile of chi-square with 8 degrees of freedom


@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding(0.7), Decoding(1.5, top_k=5), Decoding(top_p=0.6), Decoding(0.9, 6, 0.8)],
)
def test_a_decoding_means_what_it_means_where_models_write_by_themselves(decoding):
    rows = random_rows(300, 11).float()
    rows[::2] = rows[::2].round(decimals=0)  # with ties
    theirs, ours = decoded([rows], (1.0,), decoding), warped(rows, decoding)
    if decoding.top_p < 1:  # which of equals goes is nobody's promise
        theirs, ours = theirs.sort(-1).values, ours.sort(-1).values
    close(ours.exp(), theirs.exp(), 1e-12)


def test_models_that_are_being_trained_write_without_dropout_and_stay_in_training():
    target, draft = fresh(1), fresh(2)
    target.model.train()
    speculate(target, draft, PROMPT, 3, torch.Generator())
    assert target.model.training and not draft.model.training
    with pytest.raises(ValueError, match="64 positions"):
        speculate(target, draft, PROMPT, 62, torch.Generator())


def test_a_restricted_vocabulary_writes_ids_of_it():
    vocabulary = torch.tensor([0, 3, 4, 9, 20])
    target, draft = (CausalLM(tiny(seed), vocabulary) for seed in (1, 2))
    out = speculate(target, draft, torch.tensor([3, 9]), 30, torch.Generator().manual_seed(0), ends=())
    assert torch.isin(out.ids, vocabulary).all() and out.written == 30
    columns = torch.tensor([1, 3, 4])
    anew = uncached(target)(vocabulary[columns], 2)
    torch.testing.assert_close(Cached(target)(columns, 2), anew, rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"ids \[1\] are outside the vocabulary"):
        speculate(target, draft, torch.tensor([1]), 3, torch.Generator())
    with pytest.raises(ValueError, match="5 and 24 tokens"):
        speculate(target, CausalLM(draft.model), torch.tensor([3]), 3, torch.Generator())


def test_heads_with_a_soft_cap_are_read_through_the_model():
    class Capped(LlamaForCausalLM):
        def forward(self, *arguments, **options):
            out = super().forward(*arguments, **options)
            out.logits = 2 * torch.tanh(out.logits / 2)
            return out

    model = tiny(1)
    model.__class__ = Capped
    model.config.final_logit_softcapping = 2.0
    target = CausalLM(model)
    assert not target.has_plain_head
    ids = torch.tensor([3, 5, 7, 9])
    torch.testing.assert_close(Cached(target)(ids, 2), uncached(target)(ids, 2), rtol=0, atol=2e-5)


def test_a_text_is_over_with_the_targets_end():
    target, draft = CausalLM(tiny(1)), CausalLM(tiny(2))
    assert target.ends == (EOS,)
    generator, lengths = torch.Generator().manual_seed(0), set()
    for _ in range(20):
        ids = speculate(target, draft, torch.tensor([3, 9]), 25, generator).ids[2:].tolist()
        assert EOS not in ids[:-1]
        assert ids[-1] == EOS or len(ids) == 25
        lengths.add(len(ids))
    assert len(lengths) > 1
