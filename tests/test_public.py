"""The public surface, pinned: what is exported, how it is made, and which way imports point."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_divergences import ROWS

import fdiv

PACKAGE = Path(fdiv.__file__).parent

# Every exported name with its dataclass fields and defaults; None is not a dataclass. Adding a line
# is the decision to support a name; changing one breaks somebody's recipe. The f-divergences are pinned
# by their rows in tests/test_divergences.py, so that adding one touches no file but those three.
EXPORTS = {
    "testing": None,
    "BregmanDivergence": None,
    "Divergence": None,
    "FDivergence": None,
    "Reverse": "divergence",
    "Sum": "terms",
    "MetricDivergence": None,
    "OnPoints": "metric, points",
    "AlphaBeta": "alpha, beta",
    "CauchySchwarz": "bandwidth",
    "Energy": "unbiased=False",
    "Generator": "f_of_log_ratio",
    "Gaussian": "bandwidth",
    "Laplace": "bandwidth",
    "MMD": "kernel=Gaussian(bandwidth=1.0), unbiased=False",
    "Renyi": "alpha",
    "Sinkhorn": "blur, p=2, debias=True, tolerance=None, chunk=None",
    "Sliced": "p=2, directions=64, seed=0, orthogonal=False",
    "Wasserstein1D": "p=2, cost=None",
    "Estimator": None,
    "Guarantee": "bias, bound, support",
    "Exact": "",
    "Head": None,
    "FusedAtoms": "of, chunk=None, compiled=None",
    "FusedLinear": "chunk=None, of, gradient='forward', compiled=None",
    "FusedLogProb": "chunk=None, compiled=None",
    "MonteCarlo": "samples='q', gradient='score'",
    "SampledLogits": "n=50, proposal='mixture'",
    "TopK": "k, support='teacher'",
    "Variational": "",
    "Method": None,
    "Out": None,
    "GKD": "divergence, estimator, lmbda=0.0, temperature=1.0",
    "SFT": "divergence",
    "ABKD": "divergence, estimator, sampler",
    "AKL": "divergence, estimator, sampler, head=0.5",
    "AMiD": "divergence, estimator, sampler, alpha=0.0, weight=0.1, pair='p, r'",
    "BDKD": "divergence, estimator, sampler, weight=3.0",
    "DistiLLM": "divergence, estimator, sampler",
    "DistiLLM2": "divergence, sampler, curriculum='code', reference_steps=100, beta=1.0, growth=0.5, "
    "detach_mixture=False",
    "Speculative": "draft_tokens=4, verdict, decoding",
    "Lossless": "",
    "Lenient": "lenience=0.5, residual_of='target'",
    "Ensemble": "weight=0.5",
    "Typical": "epsilon=0.3",
    "DistillSpec": "divergence, estimator, sampler, temperature=1.0, bounds=False",
    "RSKD": "n=50, tau=1.0, control_variate=False, cached=False, divergence, sampler",
    "MathPUMA": "divergence, weight=0.5, tau=1.0, ema=1.0, sampler",
    "DivergenceLoss": None,
    "DSKD": "divergence, weight=0.5, tau=2.0, attention=True, sampler",
    "DualSpace": None,
    "GOLD": "divergence, weights=None, bucket=True, cross_entropy=0.0, sampler",
    "ULD": "weight=1.5, cross_entropy=1.0, sampler",
    "KD": "divergence, estimator, temperature=2.0, weight=0.5",
    "MiniLLM": "divergence, estimator, sampler, importance='token', gamma=0.95, length_normalised=True, "
    "clip=0.2, reward_scale=0.5, reward_clip=100.0",
    "OnPolicyDistillation": "divergence, estimator, discount=0.0, sampler",
    "OPSD": "divergence, estimator, temperature=1.1, ema=0.0, sampler",
    "PACED": "divergence, estimator, a=1.0, b=1.0, second, switch=0.5, rate='plug-in', scale=None, sampler",
    "SDPO": "divergence, estimator, clip=2.0, ema=0.05, sampler",
    "SeqKD": "divergence, sampler",
    "SequenceFDistill": "divergence, estimator, sampler, mixture='half'",
    "TAID": "divergence, estimator, sampler, start=0.4, end=1.0, rate=0.0005, momentum=0.99, adaptive=True",
    "TIP": "divergence, estimator, keep=0.5, score='soft_or', ceiling=0.98, sampler",
    "FDPO": "divergence, beta=0.1, loss='sigmoid', label_smoothing=0.0, length_normalised=False",
    "GRPO": "divergence, estimator, beta=0.04, clip=0.2, future=True, place='loss', level='token', "
    "ratio='token', aggregate='tokens', advantage='std'",
    "QuasiRejection": "beta=1.0, divergences=(TV(), KL())",
    "FDPG": "divergence, target, proposal='policy', every=16, baseline=True, horizon=8",
    "SequenceMatch": "divergence, penalty='mixture', alpha=1.0, gamma=0.99, discounted=True, ramp=0.5, "
    "cloning=0.0, ceiling=1000.0, sampler",
    "Accept": "function='verify'",
    "Exponential": "features, lambdas",
    "Target": "scorers=()",
    "Tilt": "beta, function=None",
    "ChiPO": "beta=0.1, reward_bound=None",
    "ImplicitRewardSFT": "divergence, beta=1.0, average=True, steepest=100.0",
    "implicit_reward": None,
    "IPO": "beta=0.1, length_normalised=False",
    "KTO": "divergence, beta=0.1, desirable=1.0, undesirable=1.0",
    "MaPO": "divergence, estimator, beta=0.1",
    "SparsePO": "divergence, estimator, beta=0.1, l1=0.001, common=True, dropout=0.01",
    "TDPO": "divergence, estimator, beta=0.1, alpha=0.5, stop_gradient=True",
    "APO": "divergence, beta=0.001, clip=0.2, sharpness=2.718281828459045, length_rate=1e-05, "
    "aggregate='sequences'",
    "DisCO": "divergence, score='log-likelihood', tilt, tau=None, beta=1000.0, delta=0.0001",
    "DPH": "divergence, eta=0.01, clip=(0.2, 0.28), cap=None, rehearsal",
    "Rehearsal": "tries=8, threshold=0.75, batch=32, answers=1",
    "OccupancyPO": "divergence, beta=0.1, root=True, clip=0.2, cap=10.0, floor=0.0001",
    "ROSE": "divergence, estimator, beta=0.001, clip=0.2, branching, length=1.0, shared='each', "
    "future=True, aggregate='tokens'",
    "FLAT": "divergence, stat='prob', legacy=False",
    "GradientAscent": "per_token=False, retain=0.0",
    "NPO": "divergence, beta=0.1, retain=0.0",
    "Branching": "first=1, epsilon=0.5, measure",
    "Dispersion": "top=20, distance=True",
    "SemanticEntropy": "clusterer, continuations=4, candidates=4",
    "Overlap": "run=1, threshold=0.5",
    "SameAnswer": "pattern=None",
    "DPT": "divergence, estimator",
    "R2PVI": "divergence, lam=0.1, beta=1.0, ridge=0.1, reward_max=1.0, penalty='paper', shrink_to='ones'",
    "DatamodelMatching": "divergence, retained=3.0",
    "worst_case": None,
    "OccupancyReward": "divergence, root=True, trim=0.01, cap=7.0",
    "WSRL": "warmup=5000, updates=4, members=10, subset=2, discount=0.99, temperature=0.01",
    "MaxSliced": "p=2, starts=16, steps=50, seed=0",
    "ClassRatio": "divergence, weight=1.0, class_weights=(), floor=1e-10",
    "DHKD": "divergence, weight=1.0, temperature=2.0, compare='difference', hidden=200, "
    "align=True, cross_entropy=1.0",
    "DIST": "beta=2.0, gamma=2.0, temperature=1.0, cross_entropy=1.0, eps=1e-08",
    "DKD": "divergence, alpha=1.0, beta=8.0, temperature=4.0, warmup=0.08333333333333333, cross_entropy=1.0",
    "MutualKD": "divergence, sharpening, of_teacher, weight=2.0, share=1.0, temperature=1.0, online=True",
    "OFA": "divergence, gamma=1.5, stages=None, weight=1.0, branch_weight=1.0, temperature=1.0, "
    "cross_entropy=1.0, layout='auto'",
    "PLD": "divergence, temperature=1.0",
    "SinKD": "divergence, pointwise, kd=0.8, weight=0.0008, temperature=2.0, eps=0.1, "
    "iterations=20, debias=False",
    "crps": None,
    "CRPSKL": "divergence, weight=0.001, warmup=0.1, members=8, fair=True, row_weights=(), draws='posterior'",
    "CSIB": "divergence=CauchySchwarz(bandwidth=1.0), beta=0.01, bandwidth=1.0, "
    "feature_bandwidth=1.0, weighting='row', normalised=False",
    "DEPICT": "divergence, power=1.0, balance=0.5, reconstruction=1.0, hidden=0.1, warmup=0.2, "
    "restarts=20, seed=0",
    "FactorConsistency": "divergence, weight=1.0, floor=1e-08, law=()",
    "Reconstruction": "hidden=0.1",
    "AdversarialCompSum": "tau=1.0, rho=1.0, nu=1.0, attack",
    "Attack": "epsilon=0.1, steps=10, step_size=None, norm='linf', bounds=(0.0, 1.0), "
    "start='uniform', noise=0.001",
    "DONE": "lam=1.0, rate=0.1, attack=Attack(epsilon=0.1, steps=10, step_size=None, norm='linf', "
    "bounds=(0.0, 1.0), start='uniform', noise=0.001), barrier=0.001, steps=10, "
    "linear=GMRES(tolerance=0.001, steps=1000, memory=30)",
    "CVaR": "share=0.3",
    "DRO": "divergence, lam=None, rho=None, rate=None",
    "TRADES": "divergence, beta=6.0, attack=Attack(epsilon=0.031, steps=10, step_size=0.007, "
    "norm='linf', bounds=(0.0, 1.0), start='normal', noise=0.001)",
    "WEAT": "divergence, labels_at='nat', beta=None, attack=Attack(epsilon=0.031, steps=10, "
    "step_size=0.007, norm='linf', bounds=(0.0, 1.0), start='normal', noise=0.001)",
    "AnyLoss": "metric='f1', beta=1.0, scale=73.0, threshold=0.5, classes='positive', positive=1, start=None",
    "CompSum": "tau=1.0",
    "TruncatedGCE": "q=0.7, k=0.5, start=0.5",
    "Discriminative": "divergence, weight=1.0, head='log-ratio'",
    "EMO": "mix='emo1', cost='current', adaptive=False, largest_ratio=None, chunk=None",
    "FenchelYoung": "divergence=Alpha(alpha=1.5), reference='ones'",
    "NoisyLabels": "divergence, critic='probability', rates=(), warmup=0.2",
    "ALDR": "divergence, lam=1.0, alpha=2.0, margin=0.1, scores='plain', margin_in_p=True",
    "LDR": "divergence, lam=1.0, margin=0.1, top=1, scores='plain'",
    "MarginHead": "c=0.5, aggregate='mean'",
    "SquaredError": "",
    "Family": None,
    "implicit": None,
    "f_softmax": None,
    "MongeGap": "eps, cost=None, relative=False, solver=Solver(tolerance=None, max_iter=10000, "
    "unconverged='warn', annealed=None, newton=True)",
    "sinkhorn": None,
    "AdversarialTraining": "attack",
    "FEBM": "divergence, clip=5.0, every=4, chains=512, steps=5, step_size=0.02, jump=1.0, widen=1.5",
    "MECO": "estimator='storm', beta=0.1, samples=512, noise=None, widen=1.5",
    "NCE": "ratio=1, noise=None, widen=1.5",
    "Critic": "sigma_data=0.5, levels=None, features='teacher'",
    "Known": "",
    "Denoising": "sigma_data=0.5, levels=LogNormal(mean=-1.2, std=1.2), dims=inf, steps=18, "
    "least=0.002, most=80.0, rho=7.0, drop=0.0, guidance=1.0",
    "FDistill": "divergence, every=5, gan=0.001, sigma_init=2.5, levels=Karras(least=0.002, most=80.0, "
    "rho=7.0), weight='distance', ratio=(0.1, 20.0), bins=10, bin_rate=0.0, "
    "normalise=True, regression=0.0, regression_steps=18, head_start=0, "
    "critic=Critic(sigma_data=0.5, levels=None, features='teacher'), guidance=1.0",
    "Karras": "least=0.002, most=80.0, rho=7.0",
    "LogLogistic": "median=2.5",
    "LogNormal": "mean=-1.2, std=1.2",
    "RCM": "consistency=100.0, dmd=1.0, warmup=1000, every=5, sigma_data=0.5, sigma_init=80.0, "
    "times=(1.3, 1.0, 0.6), levels=LogNormal(mean=-1.5, std=1.6), "
    "dmd_levels=LogLogistic(median=2.5), critic=Critic(sigma_data=0.5, levels=None, "
    "features='teacher'), guidance=1.0",
    "SiD": "alpha=1.2, every=1, sigma_init=2.5, levels=Karras(least=0.002, most=24.4, rho=7.0), "
    "weight='distance', head_start=0, critic=Critic(sigma_data=0.5, "
    "levels=LogNormal(mean=-1.2, std=1.2), features='teacher'), guidance=1.0",
    "SIM": "huber=None, every=1, sigma_init=2.5, levels=Karras(least=0.002, most=24.4, rho=7.0), "
    "weight='distance', head_start=0, critic=Critic(sigma_data=0.5, "
    "levels=LogNormal(mean=-1.2, std=1.2), features='teacher'), guidance=1.0",
    "UniInstruct": "divergence, every=1, gan=0.01, sigma_init=2.5, levels=Karras(least=0.002, most=24.4, "
    "rho=7.0), weight='distance', ratio=(0.1, 20.0), bins=10, bin_rate=0.0, head_start=0, "
    "critic=Critic(sigma_data=0.5, levels=LogNormal(mean=-1.2, std=1.2), "
    "features='teacher'), guidance=1.0, through_ratio=True",
    "LogVariance": "control='learned', reduction='sum', truncated=True, pace=100.0, paths=128, "
    "capacity=1000, hot=2.0, importance=0.0, effective=0.1",
    "Decoding": "temperature=1.0, top_k=None, top_p=1.0",
    "Sampler": None,
    "Offline": "decoding",
    "TeacherWritten": "decoding",
    "Both": "decoding",
    "Mix": "lmbda=1.0, decoding",
    "TeacherMixed": "alpha=0.2, decoding",
    "AdaptiveReplay": "start=0.0, step=0.1, threshold=0.1, capacity=1000, decoding",
    "parse": None,
    "f_softargmax": None,
}

# From left to right of the import direction; a module may import its own layer and those before it.
LAYERS = (
    {"_math"},
    {"_divergence", "_ratio", "_metric", "_bregman"},
    {"divergences", "notation"},
    {"operators", "estimate", "transport", "diffusion", "kernels", "testing", "sample", "networks"},
    {"methods"},
    {
        "adapters",
        "tasks",
        "teachers",
        "evaluate",
        "recipe",
        "averaging",
        "parallel",
        "pools",
        "feeds",
        "train",
        "compare",
    }
    | {"environments", "matching"}
    | {"catalogue"},
    {"cli", "__main__"},
)
SOLVED = ("divergences.sinkhorn",)  # a divergence whose value is a solver's: of the solvers' layer
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
TRAINING = 5  # from this layer on, `import fdiv` itself and the packages of the extra "train" are allowed
HEAVY = (
    "transformers",
    "matplotlib",
    "pydantic",
    "geomloss",
    "ot",
    "yaml",
    "typer",
    "rich",
    "scipy",
)


def fields_of(name: str) -> str | None:
    member = getattr(fdiv, name)
    if not (isinstance(member, type) and dataclasses.is_dataclass(member)):
        return None
    return ", ".join(
        field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
        for field in dataclasses.fields(member)
    )


def exported() -> set[str]:
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    return {
        alias.asname or alias.name
        for node in body if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }  # fmt: skip


def f_divergences() -> set[str]:
    """The names that the table of closed forms pins."""
    return {type(row.divergence).__name__ for row in ROWS} - set(EXPORTS)


def test_exactly_the_pinned_names_are_exported():
    pinned = set(EXPORTS) | f_divergences()
    missing, new = pinned - exported(), exported() - pinned
    assert not missing, f"no longer exported: {sorted(missing)}"
    assert not new, f"add a line to EXPORTS for {sorted(new)}"


def test_every_export_is_one_explicit_line():
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            (alias,) = node.names
            assert alias.asname == alias.name, f"write `import {alias.name} as {alias.name}`"


@pytest.mark.parametrize("name", EXPORTS)
def test_fields_and_defaults_are_pinned(name):
    assert fields_of(name) == EXPORTS[name]


@pytest.mark.parametrize("name", sorted(f_divergences()))
def test_the_default_of_an_f_divergence_has_a_row(name):
    member = getattr(fdiv, name)
    required = [f for f in dataclasses.fields(member) if f.default is dataclasses.MISSING]
    assert required or member() in [row.divergence for row in ROWS]


@pytest.mark.parametrize("name", [*(n for n in EXPORTS if EXPORTS[n] is not None), *sorted(f_divergences())])
def test_every_exported_dataclass_is_frozen_and_documented(name):
    member = getattr(fdiv, name)
    assert member.__dataclass_params__.frozen
    assert member.__doc__ and not member.__doc__.startswith(f"{name}("), f"{name} has no docstring"


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> int:
    name = module.split(".")[0]
    if any(f"{module}.".startswith(f"{solved}.") for solved in SOLVED):
        return LAYER["transport"]
    assert name in LAYER, f"say in LAYERS of tests/test_public.py where {name!r} belongs"
    return LAYER[name]


def imported(path: Path) -> list[str]:
    """Absolute names of all that a file imports, at any depth of the file."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["fdiv", *path.relative_to(PACKAGE).parts][: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names += [f"{source}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_never_point_to_a_later_layer(path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if module == "__init__":
        return
    layer = layer_of(module)
    for name in imported(path):
        root, _, rest = name.partition(".")
        if root != "fdiv":
            heavy = layer < TRAINING and root in HEAVY
            assert not heavy, f"{module} imports {root}, which the core does without"
        elif not _is_module(rest):  # a name that __init__ exports
            assert layer >= TRAINING, f"{module} imports {name} from the package that imports it"
        else:
            target = layer_of(rest)
            assert target <= layer, f"{module} (layer {layer}) imports {name} (layer {target})"


def _is_module(dotted: str) -> bool:
    first = PACKAGE / dotted.split(".")[0]
    return bool(dotted) and (first.is_dir() or first.with_suffix(".py").exists())


def test_only_adapters_import_transformers():
    importers = {
        path.relative_to(PACKAGE).parts[0]
        for path in modules()
        if any(name.split(".")[0] == "transformers" for name in imported(path))
    }
    assert importers <= {"adapters", "compare.py"}  # compare notes its version


def test_importing_fdiv_imports_torch_and_nothing_else_that_is_heavy():
    code = (
        "import sys, torch; before = set(sys.modules); import fdiv; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    added = set(run.stdout.split())
    assert not added & {*HEAVY, "pytest", "hypothesis", "trl", "triton", "jinja2"}
    assert "fdiv" in added
