import json

import pytest

from switchx.errors import UserError
from switchx.research import moe_benchmark
from switchx.research.moe_benchmark import Case


def test_a_layer_is_measured_beside_its_twin_and_its_experts():
    figures = moe_benchmark.measure(Case(64, 8, 12, 4, groups=2), steps=2)
    variants = {"layer", "twin", "experts", "dropless"}
    forward = {f"{name}_forward" for name in ("layer", "twin", "experts")}
    assert set(figures["seconds"]) == variants | forward
    assert all(each > 0 for each in figures["seconds"].values())
    for name in ("ratio", "layer_over_experts", "dropless_ratio", "temp_mb", "tokens_mb"):
        assert figures[name] >= 0, name


def test_decoding_is_measured_forward():
    figures = moe_benchmark.measure(Case(3, 8, 12, 4, decode=True), steps=1)
    assert set(figures) == {"ratio", "seconds"} and figures["ratio"] > 0


def test_cases_by_name_or_by_how_they_begin():
    assert moe_benchmark.case_names("cpu_e8,decode") == [
        "cpu_e8",
        "decode_1",
        "decode_8",
        "decode_64",
    ]
    with pytest.raises(UserError, match="there is no case 'cpu_e9'; did you mean 'cpu_e8'"):
        moe_benchmark.case_names("cpu_e9")


def test_a_line_of_json_a_case(monkeypatch, capsys):
    monkeypatch.setattr(moe_benchmark, "measure", lambda case, *, steps: {"steps": steps})
    moe_benchmark.report(["cpu_e8", "cpu_base"], steps=3)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"case": "cpu_e8", "steps": 3}, {"case": "cpu_base", "steps": 3}]


def test_growth_is_plotted(monkeypatch, tmp_path):
    def figures(case, *, steps):
        seconds = {"layer": case.tokens * 1e-6 * case.num_experts}
        ratios = {"layer_over_experts": 1.1, "layer_over_experts_forward": 1.2}
        return {**ratios, "seconds": seconds}

    monkeypatch.setattr(moe_benchmark, "measure", figures)
    plot = tmp_path / "growth.svg"
    moe_benchmark.report(["cpu_e8", "cpu_e32", "cpu_16k", "decode_1"], steps=1, plot=str(plot))
    text = plot.read_text()
    assert "<svg" in text and "layer ÷ its experts alone" in text
    assert "8 experts of 512, one group" in text
    with pytest.raises(UserError, match="--plot: decoding is not plotted"):
        moe_benchmark.report(["decode_1"], steps=1, plot=str(plot))
    monkeypatch.setattr(moe_benchmark.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--plot needs matplotlib"):
        moe_benchmark.report(["cpu_e8"], steps=1, plot=str(plot))
