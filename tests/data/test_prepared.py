"""TFDS data on disk: names that are wrong, and data that is not there."""

import pytest

from switchx.data.prepared import find_builder
from switchx.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("glue/rte:2.0.0", "'glue/rte:2.0.0' is not prepared under .*download_and_prepare"),
        ("glu/rte", "TFDS has no dataset 'glu/rte'; did you mean 'glue'"),
        ("glue/rtee", "'glue/rtee' is not usable: .*rtee not found"),
    ],
)
def test_what_cannot_be_read_is_said_at_once(tmp_path, name, message):
    with pytest.raises(UserError, match=message) as caught:
        find_builder(name, str(tmp_path))
    assert "\n" not in str(caught.value)
