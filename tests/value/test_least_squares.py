"""The streaming sums against least squares in float64 on all rows at once."""

import pytest
import torch

from stitchvm_ext.value.least_squares import LeastSquares, PositionSums, pseudo_inverse, squares

IMAGES, FITTED, POSITIONS, CHANNELS, OUT = 144, 108, 25, 96, 24


def hard_data(seed=0):
    """Features with outlier channels, means far above their spread, and a condition number near 1e4."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(randn(CHANNELS, CHANNELS)).Q
    scale = torch.logspace(0, -3, CHANNELS, dtype=torch.float64)
    features = randn(IMAGES, POSITIONS, CHANNELS) * scale @ basis
    features = (features + 10 * randn(CHANNELS) + randn(POSITIONS, CHANNELS)).float()
    features[..., :3] *= 30
    targets = features.double() @ randn(CHANNELS, 2 * OUT) / CHANNELS + randn(IMAGES, POSITIONS, 2 * OUT)
    return features, (targets + 5 * randn(POSITIONS, 2 * OUT)).float()


def fit(features, targets, per_position=slice(OUT, None), batch=7):
    """The fitted images' sums and solution."""
    sums, target_sums = LeastSquares(), PositionSums()
    for f, g in zip(features[:FITTED].split(batch), targets[:FITTED].split(batch), strict=True):
        sums.add(f, target_sums.add(g))
    return sums, sums.solve(target_sums, per_position)


def exact_error(features, targets, axes):
    """Squared error over the last images of float64 least squares on the fitted ones."""
    f, g = features.double(), targets.double()
    mean_f, mean_g = f[:FITTED].mean(axes, keepdim=True), g[:FITTED].mean(axes, keepdim=True)
    a, b = (f[:FITTED] - mean_f).flatten(0, 1), (g[:FITTED] - mean_g).flatten(0, 1)
    w = torch.linalg.lstsq(a, b, rcond=1e-5, driver="gelsd").solution
    return (mean_g + (f[FITTED:] - mean_f) @ w - g[FITTED:]).square().sum().item()


def test_held_out_error_is_that_of_float64_to_a_millionth():
    features, targets = hard_data()
    _, solution = fit(features, targets)
    shared, per_position = solution.squared_error(features[FITTED:], targets[FITTED:], 2).tolist()
    assert shared == pytest.approx(exact_error(features, targets[..., :OUT], (0, 1)), rel=1e-6)
    assert per_position == pytest.approx(exact_error(features, targets[..., OUT:], (0,)), rel=1e-6)
    flat = solution.bias[:, :OUT]
    assert torch.equal(flat, flat[:1].expand_as(flat)) and not torch.equal(solution.bias[0], solution.bias[1])


def test_weight_and_bias_are_the_prediction():
    features, targets = hard_data()
    _, solution = fit(features, targets)
    predicted = features[FITTED:].double() @ solution.weight.double().T + solution.bias.double()
    error = (predicted - targets[FITTED:].double()).square().sum().item()
    assert solution.squared_error(features[FITTED:], targets[FITTED:], 1).item() == pytest.approx(error, rel=1e-4)


def test_dependent_channels_get_the_pseudo_inverse():
    features, targets = hard_data()
    features[..., 40:] = features[..., :56]
    _, solution = fit(features, targets)
    error = solution.squared_error(features[FITTED:], targets[FITTED:], 2)[1].item()
    assert error == pytest.approx(exact_error(features, targets[..., OUT:], (0,)), rel=1e-5)


@pytest.mark.parametrize("smallest", [1e-8, 1e-12])
def test_pseudo_inverse_drops_eigenvalues_below_the_cutoff_alone(smallest):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -3, 12, dtype=torch.float64)
    values[-1] = smallest
    inverse = pseudo_inverse(basis * values @ basis.T)
    kept = torch.where(values > 1e-10, 1 / values, 0.0)
    torch.testing.assert_close(torch.linalg.eigvalsh(inverse), kept.sort().values, rtol=1e-5, atol=1e-6)


def test_sums_hold_as_much_for_many_images_as_for_few():
    features, targets = hard_data()

    def held(images):
        sums, _ = fit(features[:images], targets[:images], batch=4)
        return sum(t.untyped_storage().nbytes() for t in (sums.gram, sums.cross, sums.features.sum))

    assert held(8) == held(FITTED)


def test_products_are_float32_whatever_the_program_allows():
    features, targets = hard_data()
    _, expected = fit(features, targets)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        _, found = fit(features, targets)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.weight, expected.weight)


def test_squares_of_equal_parts():
    x = torch.arange(12.0).view(1, 2, 6)
    assert squares(x, 2).tolist() == pytest.approx([0 + 1 + 4 + 36 + 49 + 64, 9 + 16 + 25 + 81 + 100 + 121])
