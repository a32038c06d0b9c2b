"""Errors of reference losses: they are what the losses scatter by when the points do, and there are none where none can be had."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import shearling
from shearling.cli import app
from shearling.data.reference import fit_reference
from shearling.errors import DataError

SIZES = (7e7, 1.6e8, 4.1e8, 1.0e9, 1.4e9, 2.8e9, 6.9e9, 1.2e10)


def law(size: float) -> float:
    return 1.1 * (size / 1e9) ** -0.25 + 1.7


def points(sizes: tuple[float, ...], noise: float, seed: int, repeats: int = 1) -> list[tuple[str, float, float]]:
    draw = np.random.default_rng(seed)
    return [("web", size, law(size) + noise * draw.normal()) for size in sizes for _ in range(repeats)]


@pytest.mark.parametrize("parameters", [3e7, 5e8, 4e10])
def test_the_error_is_what_the_loss_scatters_by(parameters: float) -> None:
    """600 tables with the same noise: the errors given are, in the root mean square, the scatter of the losses given."""
    found = [fit_reference(points(SIZES, 0.004, seed), parameters)["web"] for seed in range(600)]
    off = np.array([estimate.loss - law(parameters) for estimate in found])
    errors = np.array([estimate.standard_error for estimate in found], dtype=np.float64)
    assert math.sqrt(np.square(errors).mean()) == pytest.approx(off.std(), rel=0.12)
    # Student's t with 8 - 3 degrees of freedom: 95 % lie within 2.571 errors.
    assert 0.92 < (np.abs(off) < 2.571 * errors).mean() < 0.975


def test_the_error_by_hand_of_a_law_that_is_nearly_linear() -> None:
    """Against J, s and the gradient written out, at the least-squares solution found by another solver."""
    from scipy.optimize import least_squares

    given = points(SIZES, 0.01, 5)
    sizes, losses = np.array([(size / 1e9, loss) for _, size, loss in given]).T

    def residuals(theta: np.ndarray) -> np.ndarray:
        return np.asarray(theta[0] * sizes ** -theta[1] + theta[2] - losses)

    best = least_squares(residuals, [1.0, 0.3, 1.5], ftol=1e-14, xtol=1e-14, gtol=1e-14)
    scale, exponent, _ = best.x
    jacobian = np.stack([sizes**-exponent, -scale * sizes**-exponent * np.log(sizes), np.ones_like(sizes)], axis=1)
    variance = np.square(best.fun).sum() / (len(sizes) - 3)
    for size in (0.05, 0.5, 30.0):
        gradient = np.array([size**-exponent, -scale * size**-exponent * math.log(size), 1.0])
        expected = math.sqrt(gradient @ np.linalg.solve(jacobian.T @ jacobian, gradient) * variance)
        assert fit_reference(given, size * 1e9)["web"].standard_error == pytest.approx(expected, rel=1e-4)


def test_the_error_grows_with_the_distance_and_the_noise() -> None:
    def error(parameters: float, noise: float) -> float:
        found = fit_reference(points(SIZES, noise, 1), parameters)["web"].standard_error
        assert found is not None
        return found

    assert error(1e9, 0.004) < error(3e7, 0.004) < error(1e7, 0.004)
    assert error(1e9, 0.002) == pytest.approx(error(1e9, 0.004) / 2, rel=0.05)
    assert error(1e9, 0.0) < 1e-6


def test_three_sizes_have_no_error_however_often_each_was_measured() -> None:
    three = fit_reference(points((7e7, 1e9, 1.2e10), 0.0, 0), 5e8)["web"]
    assert three.standard_error is None and str(three) == f"{law(5e8):.4f} (interpolates: no error can be given)"
    assert fit_reference(points((7e7, 1e9, 1.2e10), 0.001, 0, repeats=4), 5e8)["web"].standard_error is None
    assert fit_reference(points(SIZES[:4], 0.001, 0), 5e8)["web"].standard_error is not None


def test_the_command_says_how_sure_it_is(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    rows = [("web", size, law(size)) for size in (7e7, 1e9, 1.2e10)] + [("code", size, loss) for _, size, loss in points(SIZES, 0.01, 3)]
    path.write_text("domain,parameters,loss\n" + "".join(f"{domain},{size},{loss}\n" for domain, size, loss in rows))
    found = shearling.reference(path, 5e8)
    assert found["web"] == {"loss": pytest.approx(law(5e8)), "standard_error": None}
    assert found["code"]["standard_error"] is not None and 0.001 < found["code"]["standard_error"] < 0.02
    text = CliRunner().invoke(app, ["reference", str(path), "--parameters", "5e8"]).stdout.splitlines()
    assert text[0] == f"web: {law(5e8):.4f} (interpolates: no error can be given)"
    assert text[1] == f"code: {found['code']['loss']:.4f} ± {found['code']['standard_error']:.4f}"
    assert json.loads(CliRunner().invoke(app, ["reference", str(path), "--parameters", "5e8", "--json"]).stdout) == found


def test_points_that_fit_no_law_have_no_error_either() -> None:
    with pytest.raises(DataError, match="cannot be fitted"):
        fit_reference([("web", size, 2.0) for size in SIZES], 1e9)
