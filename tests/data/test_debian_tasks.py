"""Tasks of Debian packages, from a small tree laid out as packages lay theirs."""

import json

import pytest

from switchx.data import debian_tasks
from switchx.data.tasks import FileTask
from switchx.errors import UserError

STATUS = """Package: zip
Section: utils
Source: zip-source (3.0-1)
Description: Archiver
 for .zip files
 .
 This is InfoZIP's program.

Package: no-text
Section: libs
Description: nothing more to say

Package: contributed
Section: contrib/games
Description: a game
 You play it.
"""
TRANSLATION = """Package: no-text
Description-md5: 1
Description-en: nothing more to say
 And yet there is.
"""
PAGE = (
    '<html><p id="par_1">{}</p><h1 id="hd_2">Calc</h1><p>no identity</p><p id="par_3">{}</p></html>'
)


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "root"
    (root / "var/lib/dpkg").mkdir(parents=True)
    (root / "var/lib/dpkg/status").write_text(STATUS)
    (root / "var/lib/apt/lists").mkdir(parents=True)
    (root / "var/lib/apt/lists/x_Translation-en").write_text(TRANSLATION)
    for code, texts in (("en-US", ("Click <b>OK</b>\n now.", "Bye.")), ("de", ("Jetzt.", "Ade."))):
        folder = root / "usr/share/libreoffice/help" / code / "text"
        folder.mkdir(parents=True)
        for number in range(40):
            text = f"{texts[0]} {number}"
            (folder / f"{number}.html").write_text(PAGE.format(text, f"{texts[1]} {number}"))
    return root


def test_descriptions(root):
    assert debian_tasks.descriptions(root) == {
        "zip": {
            "source": "zip-source",
            "section": "utils",
            "synopsis": "Archiver",
            "text": "for .zip files This is InfoZIP's program.",
        },
        "no-text": {
            "source": "no-text",
            "section": "libs",
            "synopsis": "nothing more to say",
            "text": "And yet there is.",
        },
        "contributed": {
            "source": "contributed",
            "section": "games",
            "synopsis": "a game",
            "text": "You play it.",
        },
    }


def test_pages_are_put_side_by_side_by_identity(root, tmp_path):
    counts = debian_tasks.build(tmp_path / "out", root, ["libreoffice_en_de", "debian_section"])
    assert sum(counts.values()) == 80 + 3 and counts["libreoffice_en_de.train.jsonl"] > 50
    rows = {}
    for split in ("train", "validation", "test"):
        lines = (tmp_path / "out" / f"libreoffice_en_de.{split}.jsonl").read_text().splitlines()
        rows[split] = [json.loads(line) for line in lines]
    found = {row["inputs"]: row["targets"] for each in rows.values() for row in each}
    assert found["Translate from English to German: Click OK now. 7"] == "Jetzt. 7"
    # Both paragraphs of a page are in one split, and the heading that is the same is in none.
    pages = [{row["targets"].split()[1] for row in each} for each in rows.values()]
    assert not pages[0] & pages[1] and not pages[0] & pages[2] and not pages[1] & pages[2]
    task = FileTask(
        "mine", str(tmp_path / "out" / "libreoffice_en_de.train.jsonl"), objective="supervised"
    )
    assert task.examples("train")
    with pytest.raises(UserError, match="libreoffice_en_de.train.jsonl' exists; remove it"):
        debian_tasks.build(tmp_path / "out", root, ["libreoffice_en_de"])


def test_what_is_missing_is_named_in_one_line(root, tmp_path):
    with pytest.raises(UserError, match="apt-get install libreoffice-help-fr .or leave") as caught:
        debian_tasks.build(tmp_path / "out", root, sorted(debian_tasks._ROWS))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="dpkg libreoffice-help-de libreoffice-help-en-us"):
        debian_tasks.build(tmp_path / "out", tmp_path, ["debian_synopsis", "libreoffice_en_de"])
    assert not (tmp_path / "out").exists()
