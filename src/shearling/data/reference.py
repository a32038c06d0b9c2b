"""Reference losses of a model that was never trained, from its family: L(N) = A / N^a + C per domain.

arXiv 2310.06694, appendix B: as all members of a family saw the same tokens, the data term of the scaling law is a constant.
Three parameters on three sizes interpolate, so read the result as an extrapolation, not as a measurement; more sizes give it an error.
"""

from __future__ import annotations

import csv
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit

from shearling.errors import DataError, Problem

_COLUMNS = ("domain", "parameters", "loss")
EXPONENTS = (1e-3, 5.0)
"""Exponents a that are believed: below is a straight line in log N or a steeper one, above a step."""
Point = tuple[str, float, float]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A loss by the law, in nats per token."""

    loss: float
    standard_error: float | None
    """By the spread of the points around the law; None of three sizes, through which it goes, and where the fit leaves it open."""

    def __str__(self) -> str:
        error = self.standard_error
        return f"{self.loss:.4f} {'(interpolates: no error can be given)' if error is None else f'± {error:.4f}'}"


def fit_reference(points: Iterable[Point], parameters: float) -> dict[str, Estimate]:
    """The loss that the power law gives each domain for a model of `parameters` parameters.

    Its standard error is that of the points' noise, carried to the loss by the delta method: sqrt(g' S g), with the gradient g of the law
    at `parameters` by (A, a, C), and S = s^2 (J'J)^-1 of the least-squares fit, s^2 being the squared residuals over the points less
    three. It takes the law to be right and the noise to be alike at all sizes, so it is the least that the error can be.

    Args:
        points: (domain, parameters, loss in nats per token) of models of one family; at least three sizes for each domain.
            Parameters are counted with the embeddings, here and in `parameters`.
        parameters: size of the model to be.

    Raises:
        DataError: fewer than three sizes in a domain, a value that is not finite and above 0, or losses that no falling power
            law fits.
    """
    by_domain: dict[str, list[tuple[float, float]]] = {}
    problems = []
    for domain, size, loss in points:
        by_domain.setdefault(domain, []).append((float(size), float(loss)))
        if not (0 < size < math.inf and 0 < loss < math.inf):
            remedy = "Both must be finite and above 0."
            problems.append(Problem(domain, f"parameters {size}, loss {loss}", remedy))
    for domain, pairs in by_domain.items():
        if (sizes := len({size for size, _ in pairs})) < 3:
            problems.append(Problem(domain, f"{sizes} sizes", "The law has three unknowns: give losses of at least three model sizes."))
    if not by_domain:
        problems.append(Problem("points", "none", "Give losses of at least three model sizes for every domain."))
    if not 0 < parameters < math.inf:
        problems.append(Problem("parameters", str(parameters), "Give the number of parameters of the model to be."))
    if problems:
        raise DataError("reference losses cannot be fitted", problems)
    return {domain: _extrapolate(domain, pairs, float(parameters)) for domain, pairs in by_domain.items()}


def _extrapolate(domain: str, pairs: Sequence[tuple[float, float]], parameters: float) -> Estimate:
    sizes, losses = np.array(pairs, dtype=np.float64).T
    # In units of the middle size A and a hardly depend on each other; with raw counts A alone spans many orders of magnitude.
    unit = float(np.exp(np.log(sizes).mean()))
    try:
        with warnings.catch_warnings():
            # Three points leave no freedom for an error estimate, and scipy warns that it has none.
            warnings.simplefilter("ignore", OptimizeWarning)
            start = _start(sizes / unit, losses)
            found, covariance = curve_fit(_law, sizes / unit, losses, p0=start, maxfev=20000, ftol=1e-14, xtol=1e-14, gtol=1e-14)
            scale, exponent, floor = found
    except RuntimeError:
        scale, exponent, floor = -1.0, 0.0, 0.0
    falls = losses[sizes.argmax()] < losses[sizes.argmin()]
    if not (falls and scale > 0 and EXPONENTS[0] < exponent < EXPONENTS[1]):
        found = ", ".join(f"{size:.6g}: {loss:.6g}" for size, loss in sorted(pairs))
        remedy = "The losses must fall as the models grow, and less with each doubling; check them, or use the source's own losses."
        raise DataError(f"{domain}: reference losses cannot be fitted", [Problem(domain, found, remedy)])
    power = (parameters / unit) ** -exponent
    gradient = np.array([power, -scale * power * math.log(parameters / unit), 1.0])
    variance = float(gradient @ covariance @ gradient) if len(set(sizes.tolist())) > 3 else math.inf
    return Estimate(float(scale * power + floor), math.sqrt(variance) if 0 <= variance < math.inf else None)


def _start(sizes: Floats, losses: Floats) -> tuple[float, float, float]:
    """The best (A, a, C) with a on a grid: for a given a the law is linear in A and C.

    The paper's notebook starts from (406.4, 0.336, 0.69). From there the search can end in the false valley at a = 0, where a
    huge negative A makes a straight line in log N; from the grid it reaches the same minimum without that risk.
    """
    best = (np.inf, -1.0, 1.0, 0.0)
    for exponent in np.geomspace(0.01, 3, 60):
        columns = np.stack([sizes**-exponent, np.ones_like(sizes)], axis=1)
        (scale, floor), *_ = np.linalg.lstsq(columns, losses, rcond=None)
        error = float(np.square(columns @ (scale, floor) - losses).sum())
        if scale > 0 and error < best[0]:
            best = (error, float(scale), float(exponent), float(floor))
    if best[1] <= 0:
        raise RuntimeError("the losses rise with the size")
    return best[1:]


def _law(size: Floats, scale: float, exponent: float, floor: float) -> Floats:
    return np.asarray(scale * size**-exponent + floor, dtype=np.float64)


def read_points(path: str | Path) -> list[Point]:
    """Read (domain, parameters, loss) from a CSV file with these three columns; further columns are let be.

    Raises:
        DataError: the file is missing or not UTF-8, a column is missing, a number cannot be read (with its line), or a domain has
            fewer than three sizes. All problems at once.
    """
    path = Path(path)
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines(), strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = f"Give a CSV file in UTF-8 with the columns {', '.join(_COLUMNS)}."
        raise DataError(f"{path}: cannot be read", [Problem("CSV", str(error), remedy)]) from None
    header = [name.strip() for name in rows[0]] if rows else []
    if missing := [name for name in _COLUMNS if name not in header]:
        remedy = f"The first line must name the columns {', '.join(_COLUMNS)}."
        raise DataError(f"{path}: not a table of losses", [Problem(", ".join(missing), ",".join(header) or "an empty file", remedy)])
    points: list[Point] = []
    problems = []
    for line, row in enumerate(rows[1:], start=2):
        if not any(cell.strip() for cell in row):
            continue
        cells = dict(zip(header, row, strict=False))
        try:
            points.append((cells["domain"].strip(), _number(cells["parameters"]), _number(cells["loss"])))
        except (KeyError, ValueError):
            remedy = "Give a domain, a number of parameters and a loss in nats per token, the numbers finite and above 0."
            problems.append(Problem(f"line {line}", ",".join(row), remedy))
    sizes = {domain: len({size for other, size, _ in points if other == domain}) for domain, _, _ in points}
    problems += [Problem(domain, f"{n} sizes", "Give at least three model sizes for it.") for domain, n in sizes.items() if n < 3]
    if not points and not problems:
        problems.append(Problem("rows", "none", "Give at least three model sizes for every domain."))
    if problems:
        raise DataError(f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}", problems)
    return points


def _number(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value
