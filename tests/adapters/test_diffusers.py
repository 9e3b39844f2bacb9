"""diffusers: pretrained models as denoisers, and momentum in its pipelines."""

import json
import math
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from fdiv.adapters.classifier import Classifier
from fdiv.adapters.diffusers import MomentumScheduler, Pipeline, Pretrained, clean, levels_of
from fdiv.compare import compare
from fdiv.diffusion.edm import heun, karras
from fdiv.diffusion.mixture import Mixture
from fdiv.diffusion.samplers import adams_bashforth, ghvb, heavy_ball
from fdiv.methods.generate.denoising import Denoising

F64 = torch.float64
DATA = Mixture(((-0.6,) * 16, (0.5,) * 16), (0.1, 0.2), (0.3, 0.7))


def tiny(**fields):
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4, **fields,
    ).eval()  # fmt: skip


class Exact(UNet2DModel):
    """What a perfectly trained model says of DATA at a time of the scheduler's."""

    def teach(self, scheduler):
        self.levels, self.predicts = levels_of(scheduler.alphas_cumprod), scheduler.config.prediction_type
        return self

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        time = torch.as_tensor(timestep, dtype=F64).expand(len(sample))
        sigma = self.levels[time.round().long()].to(sample).view(-1, 1, 1, 1)
        scale = (1 + sigma**2).sqrt()
        x = sample * scale
        x0 = DATA.denoise(x.flatten(1), sigma.flatten()).view_as(x)
        noise = (x - x0) / sigma
        said = {"sample": x0, "epsilon": noise, "v_prediction": (noise - sigma * x0) / scale}[self.predicts]
        return type("Said", (), {"sample": said})() if return_dict else (said,)


def exact(predicts="epsilon"):
    scheduler = DDPMScheduler(prediction_type=predicts, clip_sample=False)
    model = Exact(
        sample_size=4, in_channels=1, out_channels=1, block_out_channels=(4,), norm_num_groups=1,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    return model.teach(scheduler).double(), scheduler


def images(count=3, scale=1.0):
    return scale * torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_whatever_a_model_predicts_it_is_the_posterior_mean(predicts):
    model, scheduler = exact(predicts)
    denoiser = Pretrained(model, scheduler)
    for time in (0, 100, 999):
        sigma = denoiser.levels[time].item()
        x = images(scale=math.hypot(0.5, sigma))
        expected = DATA.denoise(x.flatten(1), sigma).view_as(x)
        torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
def test_noise_is_added_as_diffusers_adds_it_and_taken_away(predicts):
    # z by the scheduler's own add_noise, what is predicted by its definition there.
    scheduler = DDPMScheduler(prediction_type=predicts)
    x0, noise, time = images(), images().flip(0), torch.tensor([3, 500, 999])
    z = scheduler.add_noise(x0, noise, time)
    said = {"epsilon": noise, "sample": x0}.get(predicts)
    said = scheduler.get_velocity(x0, noise, time) if said is None else said
    sigma = levels_of(scheduler.alphas_cumprod)[time].view(3, 1, 1, 1)
    torch.testing.assert_close(clean(said, z, sigma, predicts), x0, rtol=0, atol=2e-4)  # its table is float32


def test_between_two_levels_the_time_is_between_theirs():
    denoiser = Pretrained(tiny(), DDPMScheduler())
    torch.testing.assert_close(denoiser.time(denoiser.levels), torch.arange(1000, dtype=F64))
    middle = (denoiser.levels[10] * denoiser.levels[11]).sqrt().view(1)
    assert denoiser.time(middle).item() == pytest.approx(10.5)


def test_samples_of_a_pretrained_pipeline_have_the_datas_moments():
    model, scheduler = exact()
    denoiser = Pretrained.of(DDPMPipeline(model, scheduler))
    low, high = denoiser.levels[0].item(), denoiser.levels[-1].item()
    found = Denoising(steps=25, least=low, most=high).sample(denoiser, images(500)).flatten(1)
    assert (found.mean(1) > 0).double().mean().item() == pytest.approx(0.7, abs=0.06)
    assert found[found.mean(1) > 0].std().item() == pytest.approx(0.2, abs=0.02)


def test_a_random_unet_is_read_row_by_row_with_gradients_to_x():
    denoiser = Pretrained(tiny(), DDIMScheduler())
    x, sigma = images().float().requires_grad_(), torch.tensor([0.1, 1.0, 50.0])
    found = denoiser(x, sigma)
    torch.testing.assert_close(found[1:2], denoiser(x[1:2], 1.0), rtol=1e-4, atol=1e-5)
    assert bool(torch.autograd.grad(found.sum(), x)[0].isfinite().all())
    assert heun(denoiser, 50 * x.detach(), karras(4, 0.1, 50.0)).shape == x.shape


def test_a_class_is_its_condition():
    denoiser = Pretrained(tiny(num_class_embeds=4), DDPMScheduler())
    x = images().float()
    assert denoiser.conditional
    zero, one = (denoiser(x, 1.0, torch.full((3,), c)) for c in (0, 1))
    assert not torch.allclose(zero, one)
    with pytest.raises(ValueError, match="a class"):
        denoiser(x, 1.0)
    with pytest.raises(ValueError, match="condition=None"):
        Pretrained(tiny(), DDPMScheduler())(x, 1.0, torch.zeros(3, dtype=torch.int64))


# -- the scheduler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("rule", "solver"),
    [
        ({"order": 1, "momentum": 1.0}, lambda *a: adams_bashforth(*a, 1)),
        ({"order": 2, "momentum": 0.8}, lambda *a: ghvb(*a, 2, 0.8)),
        ({"order": 4, "momentum": 0.5, "rule": "heavy ball"}, lambda *a: heavy_ball(*a, 4, 0.5)),
    ],
)
def test_in_a_pipeline_it_takes_the_steps_of_the_sampler(predicts, rule, solver):
    model, trained = exact(predicts)
    scheduler = MomentumScheduler.of(trained, **rule)
    pipeline = DDPMPipeline(model, trained)
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(4, torch.Generator().manual_seed(0), num_inference_steps=12, output_type="pt").images
    z = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=model.dtype)
    sigmas = torch.tensor(scheduler.sigmas, dtype=F64)
    x = z * (1 + sigmas[0] ** 2).sqrt()
    expected = (solver(Pretrained(model, trained), x, sigmas) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(found.to(F64), expected, rtol=1e-5, atol=1e-5)


def test_the_first_order_without_momentum_is_ddim():
    model, _ = exact()
    ddim = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True)
    ours = MomentumScheduler.of(ddim, order=1, momentum=1.0)
    z, found = images(), images()
    for scheduler in (ddim, ours):
        scheduler.set_timesteps(10)
    assert ours.timesteps.tolist() == ddim.timesteps.tolist()
    for time in ddim.timesteps:
        z = ddim.step(model(z, time, return_dict=False)[0], time, z).prev_sample
        found = ours.step(model(found, time, return_dict=False)[0], time, found, return_dict=False)[0]
    torch.testing.assert_close(found, z, rtol=1e-4, atol=1e-4)


def test_a_second_run_forgets_the_first():
    model, trained = exact()
    scheduler, results = MomentumScheduler.of(trained, 3, 0.6), []
    for _ in range(2):
        scheduler.set_timesteps(5)
        z = images()
        for time in scheduler.timesteps:
            z = scheduler.step(model(z, time).sample, time, z).prev_sample
        results.append(z)
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_it_is_rebuilt_from_its_config_and_adds_noise_as_the_others(tmp_path):
    scheduler = MomentumScheduler.of(DDPMScheduler(prediction_type="sample"), 3, 0.6, "nesterov")
    scheduler.save_pretrained(tmp_path)
    again = MomentumScheduler.from_pretrained(tmp_path)
    assert again.settings == (3, 0.6, "nesterov")
    assert again.predicts == "sample"
    torch.testing.assert_close(again.levels, scheduler.levels)
    times = torch.tensor([0, 500, 999])
    expected = DDPMScheduler().add_noise(images(), images().flip(0), times)
    torch.testing.assert_close(
        again.add_noise(images(), images().flip(0), times), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: Pretrained(tiny(), FlowMatchEulerDiscreteScheduler()), TypeError, "alphas_cumprod"),
        (lambda: Pretrained.of(object()), TypeError, "unet and a scheduler"),
        (lambda: Pretrained(tiny(), DDPMScheduler())(images().float(), 1e-3), ValueError, "write karras"),
        (lambda: Pretrained(tiny(), DDPMScheduler())(images().float(), 1e3), ValueError, "write karras"),
        (lambda: MomentumScheduler.of(DDPMScheduler(), 0), ValueError, "order"),
        (lambda: MomentumScheduler.of(DDPMScheduler()).set_timesteps(0), ValueError, "1 to 1000"),
        (lambda: MomentumScheduler([0.5, 0.0]), ValueError, "no sigma"),
        (lambda: MomentumScheduler.of(DDPMScheduler()).step(images(), 5, images()), ValueError, "is not 5"),
    ],
)
def test_what_makes_no_sense_is_refused(call, error, said):
    with pytest.raises(error, match=said):
        call()


def test_a_model_that_learns_its_variance_is_refused():
    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=4, in_channels=1, out_channels=2, block_out_channels=(4,), norm_num_groups=1,
        layers_per_block=1, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="variance"):
        Pretrained(model, DDPMScheduler())


# -- as a network of a recipe -------------------------------------------------------------------------------


RECIPE = {
    "name": "tiny",
    "plugins": ["fdiv.adapters.diffusers"],
    "task": 'Images("digits")',
    "student": "reference",
    "method": "FDistill(every=2, gan=0.01, levels=Karras(0.02, 20.0), critic=Critic(sigma_data=0.75))",
    "divergences": ["JS(0.5)"],
    "train": {"steps": 4, "batch_size": 4, "examples": 16, "log_every": 1},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline for digits, in a folder."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pipeline")
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(folder)
    return folder


def test_a_pipeline_is_distilled_by_a_recipe(saved, tmp_path):
    pytest.importorskip("sklearn")
    model = {"network": f'Pipeline("{saved}")'}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"reference": {"label": "pipeline", "model": model}}))
    chapters, failures = compare([path], tmp_path / "runs")
    assert failures == []
    log = [json.loads(line) for line in next(chapters[0].glob("*/js*/metrics.jsonl")).open()]
    assert {"fake_score_loss", "discriminator_accuracy"} <= log[0].keys()
    student = Classifier.load(next(chapters[0].glob("*/js*/model")), Pipeline(str(saved)))
    start = Pipeline(str(saved)).build(torch.Size([1, 8, 8]), 64)
    both = zip(student.model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in both)


def test_features_are_those_of_the_middle_block():
    network: Any = tiny()
    model, x = Pretrained(network, DDPMScheduler()), torch.randn(3, 1, 4, 4)
    found = model.features(x, torch.full((3,), 0.5))
    assert found.shape == (3, model.width) == (3, 8)
    assert not network.mid_block._forward_hooks
    assert not torch.equal(found, model.features(x, torch.full((3,), 5.0)))


def test_a_pipeline_of_another_shape_is_refused(saved):
    with pytest.raises(ValueError, match=r"shape \(1, 8, 8\), and the task's are \(3, 32, 32\)"):
        Pipeline(str(saved)).build(torch.Size([3, 32, 32]), 3072)
