"""Reference losses: the paper's table, laws that are known, and tables that cannot be fitted."""

from __future__ import annotations

from pathlib import Path

import pytest

from shearling.data.reference import fit_reference, read_points
from shearling.errors import DataError

DOMAINS = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
FAMILY = {  # held-out losses of LLaMA2 7B, 13B and 70B by number of parameters
    6738415616: (1.7520, 0.6216, 1.9063, 1.4482, 1.4844, 1.2637, 1.9219),
    13015864320: (1.6680, 0.5791, 1.8242, 1.3936, 1.3945, 1.2109, 1.8486),
    68976648192: (1.4621, 0.4890, 1.6450, 1.2805, 1.2118, 1.1148, 1.6848),
}
TABLE_6 = {  # arXiv 2310.06694, table 6; four decimals as in the published scripts
    1345423360: (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251),
    2701560320: (1.8712, 0.6883, 2.0325, 1.5353, 1.6297, 1.3560, 2.0328),
    373867520: (2.1401, 0.8694, 2.3625, 1.7791, 2.0470, 1.6637, 2.3139),
}
POINTS = [(domain, float(size), loss) for size, losses in FAMILY.items() for domain, loss in zip(DOMAINS, losses, strict=True)]


@pytest.mark.parametrize("size", TABLE_6)
def test_the_papers_table(size: int) -> None:
    fitted = fit_reference(POINTS, size)
    assert {domain: round(found.loss, 4) for domain, found in fitted.items()} == dict(zip(DOMAINS, TABLE_6[size], strict=True))
    assert all(found.standard_error is None for found in fitted.values()), "three sizes leave nothing to judge by"


@pytest.mark.parametrize(("exponent", "floor"), [(0.03, -1.0), (0.076, 1.69), (0.3, 0.5), (0.6, 1.9)])
def test_a_known_law_is_found(exponent: float, floor: float) -> None:
    def law(size: float) -> float:
        return 2.0 * (size / 1e9) ** -exponent + floor

    for sizes in ((7e7, 4.1e8, 1.4e9, 6.9e9, 1.2e10), (6.7e9, 1.3e10, 6.9e10)):
        fitted = fit_reference([("web", size, law(size)) for size in sizes], 2.5e8)
        assert fitted["web"].loss == pytest.approx(law(2.5e8), abs=1e-6)


@pytest.mark.parametrize("losses", [(1.0, 2.0, 3.0), (2.0, 2.0, 2.0), (2.0, 1.0, 1.5), (3.0, 2.0, 0.5)])
def test_what_is_no_falling_power_law_is_refused(losses: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="web: reference losses cannot be fitted"):
        fit_reference([("web", size, loss) for size, loss in zip((1e9, 1e10, 1e11), losses, strict=True)], 1e8)


def test_too_few_sizes_and_bad_numbers_are_reported_at_once() -> None:
    with pytest.raises(DataError) as caught:
        fit_reference([("web", 1e9, 2.0), ("web", 1e9, 2.0), ("web", 2e9, float("nan")), ("code", 1e9, 1.0)], 0)
    assert [problem.field for problem in caught.value.problems] == ["web", "web", "code", "parameters"]
    with pytest.raises(DataError, match="none"):
        fit_reference([], 1e9)


def test_read_points(tmp_path: Path) -> None:
    path = tmp_path / "losses.csv"
    rows = "".join(f"{domain},{size:.0f},{loss},x\n" for domain, size, loss in POINTS)
    path.write_text("\ufeffdomain, parameters,loss,model\n" + rows + "\n", encoding="utf-8")
    assert read_points(path) == POINTS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "an empty file"),
        ("domain,size,loss\n", "parameters"),
        ("domain,parameters,loss\n", "none"),
        ("domain,parameters,loss\nweb,1e9,2\nweb,2e9,1.9\n", "web: found 2 sizes"),
        ("domain,parameters,loss\nweb,seven,2\n", "line 2: found web,seven,2"),
        ("domain,parameters,loss\nweb,1e9\n", "line 2"),
        ("domain,parameters,loss\nweb,1e9,nan\n", "line 2"),
        ('domain,parameters,loss\n"web,1e9,2\n', "cannot be read"),
    ],
)
def test_read_points_says_what_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "losses.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_points(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


def test_read_points_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"domain,parameters,loss\n\xe9,1,2\n")
    with pytest.raises(DataError, match="cannot be read"):
        read_points(tmp_path / "latin.csv")
