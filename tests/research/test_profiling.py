import pytest

from switchx.errors import UserError
from switchx.research import profiling
from switchx.research.profiling import Operations
from tests.research.test_benchmark import EXPERIMENT


def test_steps_are_traced_and_their_operations_summed(tmp_path):
    found = profiling.profile(EXPERIMENT, str(tmp_path / "trace"), steps=2, warmup=1)
    assert list(tmp_path.glob("trace/plugins/profile/*/*.xplane.pb"))
    assert all(each.seconds > 0 and each.count >= 2 for each in found[:3])
    assert [each.seconds for each in found] == sorted((e.seconds for e in found), reverse=True)
    assert len({each.kind for each in found}) == len(found) > 5


def test_the_table_is_of_one_step():
    found = [Operations("dot", 6, 0.3), Operations("fusion", 4, 0.1)]
    assert profiling.table(found, steps=2, rows=1).splitlines() == [
        " ms a step  share  a step  operation",
        "   150.000  75.0%     3.0  dot",
    ]


def test_a_file_is_no_folder(tmp_path):
    file = tmp_path / "trace"
    file.write_text("")
    with pytest.raises(UserError, match="--out=.* is a file; name a folder"):
        profiling.profile(EXPERIMENT, str(file), steps=1)
