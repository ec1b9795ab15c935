import argparse
import csv
import re
import shutil
import subprocess
import sys

import pytest

from switchx.errors import UserError
from switchx.report import report
from tests.report.chapters import STATES, VALUES
from tests.report.directories import write_analysis, write_run, write_sweep

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["scripts/report.py", *map(str, arguments)])
    report.run(argparse.ArgumentParser())


def test_a_page_and_its_tables(tmp_path, run, monkeypatch, capsys):
    sweep = write_sweep(tmp_path / "capacity", VALUES, states=STATES)
    call(monkeypatch, run, sweep, "--out", tmp_path / "new" / "report.html")
    text = (tmp_path / "new/report.html").read_text()
    assert "Sweep capacity" in text and str(run) in text and "scripts/report.py" in text
    folder = tmp_path / "new" / "report_tables"
    names = {path.name for path in folder.iterdir()}
    assert {f"sweep-capacity-settings.{kind}" for kind in ("csv", "md", "tex")} <= names
    with (folder / "sweep-capacity-trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 and rows[0]["run directory"].startswith(str(sweep))
    assert "tables in" in capsys.readouterr().out
    assert not [path for path in (tmp_path / "new").iterdir() if path.name.startswith(".")]


def test_tables_of_an_earlier_report_go_and_other_files_stay(tmp_path, run):
    out = tmp_path / "report.html"
    report.write([write_sweep(tmp_path / "s", VALUES)], out)
    folder = tmp_path / "report_tables"
    (folder / "mine.csv").write_text("kept")
    assert (folder / "settings.csv").exists()
    report.write([run], out)
    assert not (folder / "settings.csv").exists() and (folder / "runs.csv").exists()
    assert (folder / "mine.csv").read_text() == "kept"


def test_a_broken_directory_is_reported_and_the_rest_too(tmp_path, run, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "metrics.jsonl").write_text('{"step": 3, "los')
    (broken / "config.json").write_text("{")
    report.write([run, broken], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "metrics.jsonl: the last line is cut off" in text and "config.json is not JSON" in text
    assert "3 thing(s) missing or broken" in capsys.readouterr().out
    assert "Cross-entropy" in text


def test_a_directory_given_twice_is_one(tmp_path, run):
    report.write([run, run / ".." / "run"], tmp_path / "report.html")
    assert ">1 done<" in (tmp_path / "report.html").read_text()


def test_mistakes_are_one_line(tmp_path, run, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "file").write_text("")
    sweep = write_sweep(tmp_path / "s", VALUES)
    for arguments, message in (
        ([tmp_path / "nowhere"], "nowhere does not exist"),
        ([tmp_path / "file"], "is no directory"),
        ([tmp_path / "other"], "is neither a run directory"),
        ([run, "--metric=cross_entrpy"], "did you mean 'cross_entropy'"),
        ([run, "--split=eval/recal"], "did you mean 'eval/recall'"),
        ([run, f"--out={tmp_path}"], "is a directory"),
        ([run, f"--out={tmp_path / 'file' / 'x.html'}"], "cannot be written"),
        ([run, f"--base={tmp_path / 'nowhere'}"], "nowhere does not exist"),
        ([run, f"--base={sweep}"], "is a sweep; name a run"),
        ([sweep, "--base_arm=CAPACITY_FACTOR=9"], "no finished trial has it"),
    ):
        out = (
            []
            if any("--out" in str(each) for each in arguments)
            else ["--out", tmp_path / "r.html"]
        )
        with pytest.raises(UserError, match=re.escape(message)) as error:
            call(monkeypatch, *arguments, *out)
        assert "\n" not in str(error.value)
        assert not (tmp_path / "r.html").exists(), message


def test_a_metric_of_directories_without_metrics(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="no directory has metrics yet"):
        report.write([tmp_path / "run"], tmp_path / "r.html", metric="loss")


def test_without_the_extra_it_says_how_to_get_it(tmp_path, run, monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("altair", "no_such_package"))
    with pytest.raises(UserError, match=r"need no_such_package: pip install 'switchx\[report\]'"):
        report.write([run], tmp_path / "r.html")


def test_reports_are_no_burden_on_what_trains():
    code = (
        "import sys, switchx.run, switchx.report.report\n"
        "print([n for n in ('altair', 'jinja2', 'vl_convert', 'tensorflow') if n in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_a_browser_draws_every_chart_and_complains_of_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    write_analysis(run)
    evaluations = {(2.0, seed, other): 2 + seed / 10 for seed in (0, 1) for other in (1.0, 4.0)}
    sweep = write_sweep(tmp_path / "s", VALUES, states=STATES, evaluations=evaluations)
    out = tmp_path / "report.html"
    report.write([run, sweep], out)
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--disable-background-networking", "--enable-logging=stderr", "--v=0"]
    command += [f"--user-data-dir={tmp_path / 'chromium'}", "--virtual-time-budget=60000"]
    command += ["--dump-dom", f"file://{out}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    # The page's own text has such tags too, inside its scripts.
    page = re.sub(r"<script.*?</script>", "", shown.stdout, flags=re.DOTALL)
    charts = re.findall(r'<div class="chart[ "][^>]*>', page)
    assert len(charts) > 20
    assert all('data-drawn="yes"' in chart for chart in charts)
    drawn = re.findall(r'<svg[^>]*class="marks"[^>]*width="(\d+)" height="(\d+)"', page)
    assert len(drawn) == len(charts)
    assert all(int(width) > 200 and int(height) > 60 for width, height in drawn)
    # Tooltips name the directories, so they are in what was drawn from.
    assert str(run) in page and str(sweep) in page
