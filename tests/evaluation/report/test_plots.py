import struct
from xml.etree import ElementTree

import numpy as np
import pytest

from aft_ray.evaluation.report.plots import plot_curves, plot_histograms
from aft_ray.evaluation.statistics.bootstrap import Estimate
from aft_ray.evaluation.statistics.histograms import Histogram


def points(values) -> list[Estimate]:
    return [Estimate(value, value - 0.03, value + 0.03, 100) for value in values]


def texts(svg) -> str:
    return " | ".join(
        "".join(node.itertext()) for node in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    )


def size_of(png) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_a_curve_is_a_png_and_an_svg_with_its_words(tmp_path):
    series = {"VFT": points([0.3, 0.35, 0.4]), "AFT, β = 0.15": points([0.4, 0.5, 0.6])}
    path = tmp_path / "pictures" / "k"
    files = plot_curves(path, [1, 2, 4], {"GSM8K": series}, "samples k", "questions right, %")
    png, svg = files
    assert files == [tmp_path / "pictures" / "k.png", tmp_path / "pictures" / "k.svg"]
    assert min(size_of(png)) > 400
    assert len(png.read_bytes()) > 10_000
    said = texts(svg)
    assert all(word in said for word in ("VFT", "AFT, β = 0.15", "samples k", "questions right, %", "GSM8K"))


def test_the_same_values_give_the_same_files(tmp_path):
    one, other = (
        plot_curves(tmp_path / name, [0, 0.1], {"t": {"a": points([0.1, 0.2])}}, "β", "%") for name in ("one", "other")
    )
    for a, b in zip(one, other, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_panels_share_their_axis_and_a_missing_point_is_left_out(tmp_path):
    broken = [*points([0.3]), Estimate(float("nan"), float("nan"), float("nan"), 0)]
    panels = {"maj@n": {"a": broken}, "pass@n": {"a": points([0.3, 0.9])}}
    _, svg = plot_curves(tmp_path / "paths", [1, 2], panels, "n", "%", "Paths")
    said = texts(svg)
    assert all(word in said for word in ("maj@n", "pass@n", "Paths"))


@pytest.mark.parametrize("known", [True, False])
def test_histograms_have_a_panel_a_model_and_its_assessment_in_the_title(tmp_path, known):
    rng = np.random.default_rng(0)
    edges = [float(edge) for edge in np.linspace(-2, 0, 41)]
    histogram = Histogram(edges, rng.integers(50, size=40).tolist(), rng.integers(30, size=40).tolist())
    assessments = {"VFT": Estimate(0.558, 0.5, 0.6, 10)} if known else {}
    png, svg = plot_histograms(tmp_path / "scores", {"VFT": histogram, "AFT": histogram}, assessments)
    said = texts(svg)
    assert ("VFT: assessment accuracy 55.8 %" in said) is known
    assert all(word in said for word in ("AFT", "score, nats per token", f"right ({sum(histogram.right):,} samples)"))
    assert min(size_of(png)) > 400
