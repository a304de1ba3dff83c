"""The flow prior's network: the closed-form field of a Gaussian, the transformer's correction, and drawing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dogvae.config import FlowConfig
from dogvae.network.flow import Flow, GaussianField, draw
from dogvae.network.prior import Gaussian

CPU = torch.device("cpu")
SHAPES = [(2, 3, 3), (2, 4, 4), (1, 6, 6), (2, 8, 8), (1, 12, 12), (1, 16, 16)]


@pytest.fixture(scope="module")
def gaussian() -> Gaussian:
    """A Gaussian of six dimensions with correlations, and variances from 0.1 to 10."""
    generator = torch.Generator().manual_seed(0)
    rotated = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    covariance = rotated @ torch.diag(torch.logspace(-1, 1, 6, dtype=torch.float64)) @ rotated.T
    return Gaussian(torch.arange(6).double(), torch.linalg.cholesky(covariance))


def flow_of(shape: tuple[int, int, int], randomised: bool = False) -> Flow:
    torch.manual_seed(0)
    flow = Flow(FlowConfig(width=32, depth=2), shape)
    if randomised:
        with torch.no_grad():
            for p in flow.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return flow


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_velocity_of_a_gaussian_is_the_conditional_mean(gaussian: Gaussian, t: float) -> None:
    """E[x_1 - x_0 | x_t] of jointly normal variables, by solving with the covariance matrices themselves."""
    field = GaussianField.of(gaussian, CPU)
    covariance = gaussian.factor @ gaussian.factor.T / field.scale.double() ** 2
    eye = torch.eye(6, dtype=torch.float64)
    with_x_t = t * covariance - (1 - t) * eye
    of_x_t = t**2 * covariance + (1 - t) ** 2 * eye
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    expected = (with_x_t @ torch.linalg.solve(of_x_t, x.double().T)).T
    torch.testing.assert_close(field.velocity(x, torch.full((5,), t)).double(), expected, rtol=1e-4, atol=1e-5)


def test_a_flow_that_has_not_learned_draws_from_the_gaussian(gaussian: Gaussian) -> None:
    """Its correction is zero, so fine steps give the Gaussian's mean and covariance."""
    flow = flow_of((6, 1, 1))
    noise = torch.randn(4000, 6, generator=torch.Generator().manual_seed(2))
    z = draw(flow, GaussianField.of(gaussian, CPU), noise, steps=100).double()
    covariance = gaussian.factor @ gaussian.factor.T
    assert float((torch.cov(z.T) - covariance).norm() / covariance.norm()) < 0.1
    torch.testing.assert_close(z.mean(0), gaussian.mean, rtol=0, atol=0.2)
    at_zero = draw(flow, GaussianField.of(gaussian, CPU), noise[:3], temperature=0.0)
    torch.testing.assert_close(at_zero.double(), gaussian.mean.expand(3, 6))


@pytest.mark.parametrize("shape", SHAPES)
def test_correction_is_zero_at_first_and_later_depends_on_time_and_every_patch(shape: tuple[int, int, int]) -> None:
    d = math.prod(shape)
    x, t = torch.randn(2, d, generator=torch.Generator().manual_seed(3)), torch.tensor([0.2, 0.7])
    assert torch.equal(flow_of(shape)(x, t), torch.zeros(2, d))
    flow = flow_of(shape, randomised=True)
    jacobian = torch.autograd.functional.jacobian(lambda z: flow(z[None], t[:1])[0], x[0])
    assert (jacobian != 0).all()
    assert not torch.allclose(flow(x, t), flow(x, t.flip(0)))
    assert flow(x[:0], t[:0]).shape == (0, d)


def test_each_token_is_a_square_of_the_latent_map() -> None:
    """Where attention is switched off, the correction at a place depends on the 2x2 places of its own patch only."""
    flow = flow_of((3, 8, 8), randomised=True)
    for block in flow.blocks:
        with torch.no_grad():
            block.offset.zero_()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        flow.modulation.weight.zero_()
        flow.modulation.bias.zero_()
    jacobian = torch.autograd.functional.jacobian(
        lambda z: flow(z[None], torch.tensor([0.5]))[0], torch.randn(3 * 64, generator=torch.Generator().manual_seed(4))
    )
    reached = (jacobian.view(3, 8, 8, 3, 8, 8) != 0).any(dim=3).any(dim=0)  # (y, x) out, (y, x) in
    for y in range(8):
        for x in range(8):
            expected = torch.zeros(8, 8, dtype=torch.bool)
            expected[y // 2 * 2 : y // 2 * 2 + 2, x // 2 * 2 : x // 2 * 2 + 2] = True
            assert torch.equal(reached[y, x], expected)


def test_guidance_multiplies_the_correction(gaussian: Gaussian) -> None:
    flow, field = flow_of((6, 1, 1), randomised=True), GaussianField.of(gaussian, CPU)
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))

    class Tripled(torch.nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 3 * flow(x, t)

    guided = draw(flow, field, noise, guidance=2.0)
    torch.testing.assert_close(guided, draw(Tripled(), field, noise, guidance=0.0))
    assert not torch.allclose(guided, draw(flow, field, noise, guidance=0.0))


def test_flow_learns_two_clusters_that_a_gaussian_cannot_have() -> None:
    """Latents at +-2 in each of four dimensions at once: a Gaussian draws a third of them within 1 of zero."""
    generator = torch.Generator().manual_seed(6)

    def latents(n: int) -> Tensor:
        signs = torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
        return 2 * signs + 0.1 * torch.randn(n, 4, generator=generator)

    z = latents(4000)
    fitted = Gaussian(z.mean(0), torch.linalg.cholesky(torch.cov(z.T)))
    field, flow = GaussianField.of(fitted, CPU), flow_of((4, 1, 1))
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)
    for _ in range(400):
        end, start, t = field.standardised(latents(256)), torch.randn(256, 4, generator=generator), torch.rand(256)
        x = torch.lerp(start, end, t[:, None])
        loss = (field.velocity(x, t) + flow(x, t) - (end - start)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    noise = torch.randn(1000, 4, generator=generator)

    def near_zero(samples: Tensor) -> float:
        return float((samples.mean(1).abs() < 1).double().mean())

    assert near_zero(fitted.draw(noise)) > 0.3
    assert near_zero(draw(flow, field, noise, guidance=0.0)) < 0.05
