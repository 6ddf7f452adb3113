"""Latents to small pictures by a linear map."""

from __future__ import annotations

import torch

from model.checkpoint import Components
from model.pipeline import Pipeline
from model.previews import PreviewMap, fit_to, published
from model.sampling import schedule
from model.work import Begin, Denoise, Encode


class FlatVAE:
    """Stands for a VAE: each latent is three channels of the mean colour of its 8x8 pixels, mixed, and one of noise."""

    mix = torch.tensor([[0.5, 0.2, -0.1], [0.0, 0.9, 0.3], [0.4, -0.3, 0.8], [0.0, 0.0, 0.0]])

    class encoder:
        class conv_in:
            weight = torch.zeros(1)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.einsum("oc,bchw->bohw", self.mix, small) + 0.25
        mean[:, 3] = torch.randn(mean[:, 3].shape, generator=torch.Generator().manual_seed(0))
        return mean, None

    def to_model(self, z: torch.Tensor) -> torch.Tensor:
        return 1.5 * (z - 0.1)


def test_fitted_map_inverts_a_linear_encoder() -> None:
    vae = FlatVAE()
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)).round()
    latents = vae.to_model(vae.encode(2 * pixels - 1)[0])[0]
    expected = torch.nn.functional.avg_pool2d(pixels, 8)[0].movedim(0, -1) * 255
    found = fit_to(vae).rgb(latents).float()  # type: ignore[arg-type]
    assert (found - expected).abs().max() < 1


def test_fit_gives_the_same_map_each_time(components: Components) -> None:
    first, second = fit_to(components.vae), fit_to(components.vae)
    assert torch.equal(first.matrix, second.matrix)
    assert first.matrix.shape == (16, 3)


def test_published_map_shows_zero_latents_as_grey() -> None:
    assert published().rgb(torch.zeros(16, 4, 6)).unique().tolist() == [128]
    assert published().matrix[15].tolist() == torch.tensor([-0.0709, -0.07285, -0.06295]).tolist()


def test_no_side_of_a_preview_is_over_256_pixels() -> None:
    assert published().rgb(torch.zeros(16, 384, 90)).shape == (192, 45, 3)
    assert published().rgb(torch.zeros(16, 64, 256)).shape == (64, 256, 3)


def test_latents_that_are_not_finite_still_give_a_preview() -> None:
    latents = torch.full((16, 4, 4), torch.nan)
    latents[:, 0] = torch.inf
    assert PreviewMap(torch.ones(16, 3), torch.zeros(3)).rgb(latents).shape == (4, 4, 3)


def test_pipeline_previews_the_prediction_of_the_clean_latents(components: Components) -> None:
    pipeline = Pipeline(components.mmdit, components.vae, components.text, t5_length=20, preview_map=published())
    [[text]] = pipeline.run([Encode(("a cat",))])
    (latents,) = pipeline.run([Begin(1, 64, 96)])
    before = pipeline.preview(latents)
    pipeline.run([Denoise(latents, schedule("euler", 4)[0], text, None, 1.0)])
    assert before.shape == (12, 8, 3)
    assert latents.previous is not None
    assert torch.equal(pipeline.preview(latents), published().rgb(latents.previous))


def test_pipeline_without_a_map_fits_one_to_its_vae(components: Components) -> None:
    pipeline = Pipeline(components.mmdit, components.vae, components.text, t5_length=20)
    (latents,) = pipeline.run([Begin(1, 64, 64)])
    assert torch.equal(pipeline.preview(latents), fit_to(components.vae).rgb(latents.x))
