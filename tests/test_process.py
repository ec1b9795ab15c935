import os
import pathlib
import signal
import subprocess
import sys

import pytest

from switchx import process

ROOT = pathlib.Path(__file__).parents[1]
SHOW = """
from switchx import process
process.prepare()
import os, signal, sys
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[1:], sys.flags.optimize)
print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL, os.getpid())
"""


def prepared(tmp_path: pathlib.Path, **environment: str) -> tuple[list[str], int]:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    child = subprocess.Popen(
        [sys.executable, "-O", str(script), "--flag", "two words"],
        env={**kept, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    return output.splitlines(), child.pid


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's setting")
def test_a_script_starts_again_with_huge_pages_under_the_same_id_and_arguments(tmp_path):
    (first, second), pid = prepared(tmp_path)
    assert first == f"{process.HUGE_PAGES} ['--flag', 'two words'] 1"
    assert second == f"True {pid}"


@pytest.mark.parametrize("setting", ["", "glibc.malloc.check=0"])
def test_what_the_user_set_is_left_alone(tmp_path, setting):
    (first, _), _ = prepared(tmp_path, GLIBC_TUNABLES=setting)
    assert first == f"{setting} ['--flag', 'two words'] 1"


def test_every_script_is_prepared_before_its_heavy_imports():
    scripts = sorted((ROOT / "scripts").glob("*.py"))
    assert scripts
    for script in scripts:
        text = script.read_text()
        assert text.index("process.prepare()\n\nfrom switchx") > 0, script


def test_preparing_imports_nothing_heavy():
    code = "import sys; import switchx.process; print('jax' in sys.modules, 'numpy' in sys.modules)"
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "False False\n"


def test_an_interrupt_during_imports_is_silent(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(
        "from switchx import process\nprocess.prepare()\nimport time\n"
        "print('importing', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "importing\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert (child.returncode, errors) == (-signal.SIGINT, "")
