import jax
import pytest

from switchx import command_line
from switchx.errors import UserError
from switchx.training.loop import Interrupted


def ended(error, capsys) -> tuple[int, str]:
    def script():
        raise error

    with pytest.raises(SystemExit) as exit_:
        command_line.run(script)
    return exit_.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such thing; take this one"), 2, "error: no such thing; take this one\n"),
        (FileNotFoundError(2, "No such file", "x.txt"), 2, "error: No such file: x.txt\n"),
        (OSError("odd"), 2, "error: odd\n"),
        (Interrupted(15, 3), 143, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=["user", "file", "os", "signal", "ctrl-c"],
)
def test_how_a_script_ends(error, code, text, capsys):
    assert ended(error, capsys) == (code, text)


def test_out_of_memory_names_what_helps(capsys):
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 5 GB\nmore")
    code, text = ended(error, capsys)
    assert code == 2 and "BATCH_SIZE" in text and text.count("\n") == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), jax.errors.JaxRuntimeError("INTERNAL")])
def test_a_bug_keeps_its_traceback(error):
    def script():
        raise error

    with pytest.raises(type(error)):
        command_line.run(script)


def test_a_script_that_ends_well_says_nothing(capsys):
    command_line.run(lambda: None)
    assert capsys.readouterr() == ("", "")
