"""Two small Llamas with different tokenizers: what `pair` gives is what the methods take."""

import pytest
import torch
from tests.teachers.tiny_tokenizers import byte_level, sentencepiece
from tests.thinned import thinned
from tests.worlds import close

from fdiv import GKD, JS, KL
from fdiv.adapters.transformers import CausalLM
from fdiv.methods.distill.dskd import DSKD, DualSpace
from fdiv.methods.distill.gold import GOLD
from fdiv.methods.distill.uld import ULD
from fdiv.teachers.cross_tokenizer import pair
from fdiv.teachers.shared import shared_tokens

TEXTS = [
    ("the cat", " sat on the mat"),
    ("hello", " there, the cat"),
    ("déjà", " vu 漢字 😀"),
    ("the hat", " was on the cat, the mat"),
]


def llama(tokenizer, width, seed):
    return CausalLM.fresh(len(tokenizer), width, layers=1, heads=2, seed=seed)


def given(paired, student, teacher, shared, projectors=None):
    """All that a method for two tokenizers can read of a micro-batch, by name."""
    flat = paired.flat()
    log_q = student.log_softmax(*paired.student)
    with torch.no_grad():
        log_p = teacher.log_softmax(*paired.teacher)
        p_hidden = teacher.hidden(*paired.teacher)
    return flat | {
        "log_q": log_q,
        "log_p": log_p,
        "log_q_label": log_q.gather(1, flat["q_labels"].unsqueeze(1)).squeeze(1),
        "log_p_label": log_p.gather(1, flat["p_labels"].unsqueeze(1)).squeeze(1),
        "q_shared": shared.student,
        "p_shared": shared.teacher,
        "q_hidden": student.hidden(*paired.student),
        "p_hidden": p_hidden,
        "q_weight": student.head,
        "p_weight": teacher.head,
        "q_embedding": student.model.get_input_embeddings().weight,
        "p_embedding": teacher.model.get_input_embeddings().weight,
        "projectors": projectors,
        "groups": paired.groups,
        "sequences": len(paired.student.ids),
        "p_count": paired.p_tokens,
    }


def loss(method, paired, *models):
    menu = given(paired, *models)
    return method(**{name: menu[name] for name in method.reads}, count=paired.tokens).loss


@pytest.mark.parametrize(
    "method",
    thinned([ULD(), GOLD(), GOLD(KL(), bucket=False), DSKD()], 2),
    ids=["ULD", "GOLD", "bare", "DSKD"],
)
@pytest.mark.parametrize("ours", [byte_level(12), sentencepiece()], ids=["byte-level", "sentencepiece"])
def test_the_loss_falls_in_thirty_steps(method, ours):
    theirs = byte_level(90)
    student, teacher = llama(ours, 16, seed=0), llama(theirs, 24, seed=1)
    with torch.no_grad():  # a teacher that is sure of something
        teacher.head.mul_(20)
    torch.manual_seed(0)
    projectors = DualSpace(16, 24)
    paired, shared = pair(TEXTS, ours, theirs), shared_tokens(ours, theirs)
    optimizer = torch.optim.Adam([*student.model.parameters(), *projectors.parameters()], lr=1e-2)
    losses = []
    for _ in range(30):
        value = loss(method, paired, student, teacher, shared, projectors)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(p.grad is None for p in teacher.model.parameters())


@pytest.mark.parametrize("divergence", [KL(), JS(0.5)], ids=repr)
def test_with_one_tokenizer_gold_is_gkd(divergence):
    tokenizer = byte_level(40)
    student, teacher = llama(tokenizer, 16, seed=0), llama(tokenizer, 16, seed=1)
    for model in (student, teacher):
        model.model.double()
    paired, shared = pair(TEXTS, tokenizer, tokenizer), shared_tokens(tokenizer, tokenizer)
    menu = given(paired, student, teacher, shared)
    menu |= {name: menu[name].double() for name in ("log_p", "log_q", "log_p_label", "log_q_label")}
    gold = GOLD(divergence)(**{name: menu[name] for name in GOLD.reads})
    close(gold.loss, GKD(divergence)(log_p=menu["log_p"], log_q=menu["log_q"]).loss, 1e-6)


@pytest.mark.parametrize("method", [ULD(), GOLD(), DSKD()], ids=["ULD", "GOLD", "DSKD"])
def test_micro_batches_of_sequences_train_what_the_whole_batch_trains(method):
    """Padding, the numbering of groups and the denominators of the global batch together."""
    ours, theirs = byte_level(12), sentencepiece()
    student, teacher = llama(ours, 16, seed=0), llama(theirs, 24, seed=1)
    torch.manual_seed(0)
    projectors = DualSpace(16, 24)
    whole, shared = pair(TEXTS, ours, theirs), shared_tokens(ours, theirs)
    total = loss(method, whole, student, teacher, shared, projectors)
    parts = 0
    for index in torch.tensor([[2, 0], [1, 3]]):
        menu = given(whole.rows(index), student, teacher, shared, projectors)
        menu |= {"groups": whole.groups, "sequences": 4, "p_count": whole.p_tokens}
        parts = parts + method(**{name: menu[name] for name in method.reads}, count=whole.tokens).loss
    close(parts.detach(), total.detach(), 1e-5)
