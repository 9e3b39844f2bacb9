"""One notation for code, recipes and logs."""

import importlib
import math
import sys
import types

import pytest
import torch

import fdiv
from fdiv import (
    JS,
    KL,
    TV,
    Alpha,
    ChiKL,
    Generator,
    Pearson,
    Renyi,
    Reverse,
    ReverseKL,
    SkewKL,
    Sum,
    parse,
)  # fmt: skip


def entropy(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.exp() * log_ratio


@pytest.mark.parametrize(
    "divergence",
    [
        KL(), JS(0.3), Alpha(-1.5), SkewKL(1e-3), Renyi(0.5), ChiKL(2), Reverse(SkewKL(0.2)),
        0.5 * KL() + TV(), Sum(((2.0, Reverse(ChiKL(0.5))), (1e-9, JS(0.1)))), Generator(entropy),
        Reverse(Generator(entropy)), fdiv.AlphaBeta(0.2, -0.3),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_printed_reads_back(divergence):
    assert parse(repr(divergence)) == divergence
    assert parse(f"  {divergence!r}\n") == divergence


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("KL", KL()),
        ("JS", JS(0.5)),
        ("JS(0.3)", JS(0.3)),
        ("Alpha(alpha=-1)", Alpha(-1)),
        ("KL().reverse", ReverseKL()),
        ("KL.reverse", ReverseKL()),
        ("JS(0.1).reverse.reverse", JS(1 - (1 - 0.1))),
        ("ChiKL.reverse", Reverse(ChiKL())),
        ("Reverse(SkewKL(0.2))", Reverse(SkewKL(0.2))),
        ("2 * KL", Sum(((2, KL()),))),
        ("0.5 * KL() + 2 * TV", Sum(((0.5, KL()), (2, TV())))),
        ("KL + TV + Pearson", Sum(((1.0, KL()), (1.0, TV()), (1.0, Pearson())))),
        ("2 * (KL + TV)", Sum(((2.0, KL()), (2.0, TV())))),
        ("0.5 * 0.5 * KL()", Sum(((0.25, KL()),))),
        ("Alpha.trl(0.3)", Alpha(0.7)),
        ("Alpha.fdpo(0.3)", Alpha(0.3)),
        ("Alpha.amari(alpha=-1)", Alpha(1.0)),
        ("Alpha.cressie_read(1).reverse", Alpha(-1)),
        ("(KL, JS(0.1))", (KL(), JS(0.1))),
        ("[KL, TV()]", [KL(), TV()]),
        ("-1.5", -1.5),
        ("'score'", "score"),
        ("None", None),
    ],
)
def test_texts_describe_objects(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("ReversKL()", "did you mean 'ReverseKL'"),
        ("Jeffrey", "did you mean 'Jeffreys'"),
        ("2 * Tirangular()", "did you mean 'Triangular'"),
        ("Alpha.tlr(0.3)", "Alpha has no named constructor 'tlr'"),
        ("xyzzy()", "unknown name 'xyzzy'.*fdiv list"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest_known_one(text, hint):
    with pytest.raises(ValueError, match=hint):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "KL KL", "JS(beta=0.3", "lambda: 1", "(lambda: KL())()", "__import__('os')",
        "import os", "os.system('true')", "KL().__class__", "KL().__class__.__mro__",
        "KL.__init__(3)", "Alpha.__new__(3)", "KL().perspective", "KL.perspective", "KL()[0]",
        "[x for x in (1, 2)]", "KL() if True else TV()", "KL() - TV()", "KL() / 2", "2 ** KL()",
        "-KL()", "not KL()", "KL() == KL()", "f'{KL()}'", "(yield)", "x := 1", "parse('KL')",
        "testing.LAWS", "KL()(1, 2)", "'a'()", "JS(*[0.3])", "JS(**{'beta': 0.3})",
        "JS(beta=0.3, beta=0.4)", "{'a': 1}", "open('x')", "Divergence.register(KL)",
    ],
)  # fmt: skip
def test_everything_else_is_refused_without_being_run(text):
    with pytest.raises(ValueError, match=r"cannot|unknown name|no named constructor"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("JS(gamma=0.3)", r"JS\(gamma=0.3\).*unexpected keyword.*JS\(beta: float = 0.5\)"),
        ("KL(1)", "too many positional arguments"),
        ("KL() * 0.5", r"write w \* D"),
        ("2 + KL()", r"D \+ D"),
        ("2 * Renyi(2)", r"write w \* D"),
        ("Reverse(Renyi(2))", "Reverse takes an f-divergence"),
    ],
)
def test_arguments_that_do_not_fit_are_type_errors_that_show_the_signature(text, message):
    with pytest.raises(TypeError, match=message):
        parse(text)


def test_infinity_is_written_as_it_prints():
    limit = parse("LDR(lam=inf)")
    assert limit.lam == math.inf and parse(repr(limit)) == limit
    assert parse("(-inf, 1)") == (-math.inf, 1)


def test_values_out_of_their_domain_are_refused_while_reading():
    with pytest.raises(ValueError, match="0 < beta < 1"):
        parse("JS(1.0)")


def test_a_package_named_as_plugin_lends_its_classes(monkeypatch):
    plugin = types.ModuleType("someone_elses_divergences")
    plugin.Mine = type("Mine", (KL,), {})
    plugin._Hidden = plugin.Mine
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    assert importlib.import_module(plugin.__name__) is plugin
    assert type(parse("Mine()", plugins=[plugin.__name__])) is plugin.Mine
    assert parse("Mine.reverse", plugins=[plugin.__name__]) == ReverseKL()
    for text, plugins in (("Mine()", []), ("_Hidden()", [plugin.__name__])):
        with pytest.raises(ValueError, match="unknown name"):
            parse(text, plugins=plugins)
