"""Tasks made of what Debian packages have put on a machine, as JSONL files for `FileTask`.

Package descriptions (to their synopsis, to their section) and the pages of LibreOffice's help in
two languages. Splits are by source package and by page. No licence is stated for the descriptions,
and the help is MPL-2.0: make the files where they are used.
"""

import argparse
import hashlib
import html.parser
import json
import pathlib
import subprocess
from collections.abc import Iterable, Iterator, Mapping

import tqdm

from switchx.errors import UserError

# Shares of validation and test; the rest is for training.
_HELD_OUT = 0.05
_HELP = "usr/share/libreoffice/help"
_BLOCKS = {"h1", "h2", "h3", "h4", "h5", "h6", "p"}


def flag_parser(description: str) -> argparse.ArgumentParser:
    """The flags of scripts/build_debian_tasks.py."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=pathlib.Path, help="folder of the files")
    parser.add_argument("--root", type=pathlib.Path, default="/", help="where packages are, e.g. /")
    parser.add_argument("--tasks", nargs="+", choices=sorted(_ROWS), default=sorted(_ROWS))
    return parser


def build(output_dir: pathlib.Path, root: pathlib.Path, tasks: Iterable[str]) -> dict[str, int]:
    """Write <task>.{train,validation,test}.jsonl of each task; the number of rows of each file.

    Raises:
      UserError: something is not installed under `root`, with the command that installs it; a
        file that is there already.
    """
    missing = sorted({package for task in tasks for package in _missing(root, task)})
    if missing:
        raise UserError(
            f"under {str(root)!r} there is not what the tasks are made of; run: apt-get install "
            f"{' '.join(missing)} (or leave tasks out with --tasks)"
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    counts = {}
    for task in tasks:
        files: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        seen = set()
        for group, row in _ROWS[task](root):
            if row["inputs"] not in seen:
                seen.add(row["inputs"])
                files[_split(group)].append(json.dumps(row, ensure_ascii=False))
        for split, lines in files.items():
            path = output_dir / f"{task}.{split}.jsonl"
            if path.exists():
                raise UserError(f"{str(path)!r} exists; remove it or choose another folder")
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            counts[path.name] = len(lines)
    return counts


def descriptions(root: pathlib.Path) -> dict[str, dict[str, str]]:
    """'source', 'section', 'synopsis' and 'text' of every described package, by its name.

    Installed packages from dpkg, others from apt's lists where they have long descriptions.
    """
    found: dict[str, dict[str, str]] = {}
    stanzas = _stanzas((root / "var/lib/dpkg/status").read_text(encoding="utf-8"))
    fields: dict[str, Mapping[str, str]] = {stanza["Package"]: stanza for stanza in stanzas}
    lists = root / "var/lib/apt/lists"
    for path in sorted(lists.glob("*_Packages*")):
        for stanza in _stanzas(_index(path)):
            fields.setdefault(stanza["Package"], stanza)
    for path in sorted(lists.glob("*_Translation-en*")):
        for stanza in _stanzas(_index(path)):
            package = stanza["Package"]
            if "\n" not in fields.get(package, {}).get("Description", "\n") and package in fields:
                fields[package] = {**fields[package], "Description": stanza["Description-en"]}
    for package, stanza in fields.items():
        synopsis, _, text = stanza.get("Description", "").partition("\n")
        if text and "Section" in stanza:
            found[package] = {
                "source": stanza.get("Source", package).split(" ")[0],
                "section": stanza["Section"].split("/")[-1],
                "synopsis": " ".join(synopsis.split()),
                "text": " ".join(word for word in text.split() if word != "."),
            }
    return found


def help_pages(folder: pathlib.Path) -> dict[str, dict[str, str]]:
    """Paragraphs of a language's help pages, by page and by the identity they have in every one."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text(encoding="utf-8", errors="replace"))
        texts = {identity: " ".join(text.split()) for identity, text in page.texts.items()}
        pages[str(path.relative_to(folder))] = {key: text for key, text in texts.items() if text}
    return pages


class _Page(html.parser.HTMLParser):
    """Text of the headings and paragraphs that have an identity."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self._open: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _BLOCKS:
            self._open = dict(attrs).get("id")

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.texts[self._open] = self.texts.get(self._open, "") + data


def _synopses(root: pathlib.Path) -> Iterator[tuple[str, dict[str, str]]]:
    for each in descriptions(root).values():
        inputs = f"Summarize the description of a package: {each['text']}"
        yield each["source"], {"inputs": inputs, "targets": each["synopsis"]}


def _sections(root: pathlib.Path) -> Iterator[tuple[str, dict[str, str]]]:
    for each in descriptions(root).values():
        inputs = f"Which section is this package in? {each['synopsis']}. {each['text']}"
        yield each["source"], {"inputs": inputs, "targets": each["section"]}


def _translations(root: pathlib.Path, code: str, language: str):
    english, other = (help_pages(root / _HELP / name) for name in ("en-US", code))
    for page, texts in tqdm.tqdm(english.items(), f"en-{code}", leave=False, disable=None):
        for identity, text in texts.items():
            translated = other.get(page, {}).get(identity)
            # Names and code are the same in both.
            if translated and translated != text:
                inputs = f"Translate from English to {language}: {text}"
                yield page, {"inputs": inputs, "targets": translated}


_ROWS = {
    "debian_synopsis": _synopses,
    "debian_section": _sections,
    "libreoffice_en_de": lambda root: _translations(root, "de", "German"),
    "libreoffice_en_fr": lambda root: _translations(root, "fr", "French"),
}


def _missing(root: pathlib.Path, task: str) -> list[str]:
    """Packages that a task wants and that are not there."""
    if not task.startswith("libreoffice"):
        return [] if (root / "var/lib/dpkg/status").is_file() else ["dpkg"]
    code = task.rsplit("_", 1)[1]
    wanted = {"en-us": "en-US", code: code}
    return [
        f"libreoffice-help-{package}"
        for package, folder in wanted.items()
        if not (root / _HELP / folder).is_dir()
    ]


def _stanzas(text: str) -> Iterator[dict[str, str]]:
    """Fields of each paragraph of a Debian control file; continuation lines keep their ends."""
    for paragraph in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.split("\n"):
            if line[:1] in (" ", "\t"):
                fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
            elif ":" in line:
                name, _, value = line.partition(":")
                fields[name] = value.strip()
        if "Package" in fields:
            yield fields


def _index(path: pathlib.Path) -> str:
    if not path.suffix:
        return path.read_text(encoding="utf-8")
    # Compressed as apt was told to; its helper reads whatever it writes.
    command = ["/usr/lib/apt/apt-helper", "cat-file", str(path)]
    try:
        return subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8")
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"{str(path)!r} cannot be read by apt-helper: {error}") from error


def _split(group: str) -> str:
    digest = hashlib.blake2b(group.encode("utf-8"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    return "validation" if place < _HELD_OUT else "test" if place < 2 * _HELD_OUT else "train"
