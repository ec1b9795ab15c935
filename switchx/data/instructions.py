"""Instruction data: a task's examples under templates, as FLAN makes them.

A task `x` with templates has a twin `x_instructions`. Each of its training examples gets one
template, drawn from the seed, the task and the example alone: so the same in every process. Half of
them are few-shot, half of those of a classification task list its options. Inverted templates ask
for an input. Other splits get one template for all. Source: Longpre et al. 2023
(https://arxiv.org/abs/2301.13688), section 2 and appendix A.

The formats are FLAN's but for a mark at each seam, because SentencePiece turns the line ends that
FLAN puts there into spaces: an answer follows 'A: ', and '| ' separates examples.
"""

import dataclasses
import functools
import json
import pathlib
import re
import string
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from switchx.data import corpus, vocabulary
from switchx.data.corpus import Example
from switchx.data.examples import generator
from switchx.errors import UserError, closest, parse_json

SUFFIX = "_instructions"
OPTIONS = "\n\nOPTIONS:\n- "
ANSWER = "\n\nA:"
SEPARATOR = "\n\n\n| "
MAX_EXEMPLARS = 5
_EXTRAS = ("few_shot", "options")
# Of the law from examples to texts. Raise it with every change of what is written.
_LAW = 1


@dataclasses.dataclass(frozen=True)
class Template:
    """Two texts with {fields}: those of the task's pattern, and {inputs} and {targets}."""

    name: str
    inputs: str
    targets: str = "{targets}"

    @property
    def inverted(self) -> bool:
        """Whether it asks for something else than the task's targets."""
        return self.targets != "{targets}"


@dataclasses.dataclass(frozen=True)
class TaskTemplates:
    """The templates of a task, and the regular expression whose groups are its fields."""

    templates: tuple[Template, ...]
    pattern: str | None = None


def load(path: str | None, known: Collection[str] = ()) -> dict[str, TaskTemplates]:
    """Templates by task: those that ship, and after them those of a file of the user's own.

    The file is JSON: {"tasks": {task: {"pattern": …, "templates": [{"name": …, "inputs": …,
    "targets": …}]}}}; pattern and targets may be left out.

    Args:
      path: the file, or None.
      known: names of the tasks that it may have templates for.

    Raises:
      UserError: a file that cannot be read or is not like that, with what is wrong in it.
    """
    found = dict(_shipped())
    if path is None:
        return found
    try:
        content = pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"templates {path!r} cannot be read: {error.strerror}") from None
    for task, own in _parse(path, content).items():
        if task not in known:
            raise UserError(f"templates {path!r}: no task is called {task!r}{closest(task, known)}")
        if task not in found:
            found[task] = own
            continue
        first = found[task]
        if own.pattern is not None:
            raise UserError(f"templates {path!r}: task {task!r} has its pattern already")
        found[task] = TaskTemplates((*first.templates, *own.templates), first.pattern)
    for task, each in found.items():
        _check(path, task, each)
    return found


@dataclasses.dataclass(frozen=True)
class InstructionTask:
    """A task under templates.

    `inputs_length` is in tokens of `vocabulary`: exemplars, and then options, are left out where
    they would not fit. `evaluation` names the template of the splits other than 'train', with
    '+few_shot' and '+options' if they are wanted; None is the first one that is not inverted.

    Raises:
      UserError: a base that is not supervised, or an unknown template.
    """

    base: Any
    templates: TaskTemplates
    seed: int
    inputs_length: int
    vocabulary: str
    evaluation: str | None = None
    objective: str = "supervised"

    def __post_init__(self) -> None:
        """Check that there are pairs to put under templates."""
        if self.base.objective != "supervised" or not hasattr(self.base, "examples"):
            raise UserError(
                f"task {self.name!r}: templates are for supervised tasks that ship and for "
                f"FileTasks; {self.base.name!r} is neither"
            )
        self._evaluation()

    @property
    def name(self) -> str:
        """The base's name and '_instructions'."""
        return f"{self.base.name}{SUFFIX}"

    @property
    def metrics(self) -> Sequence[str]:
        """Those of the base."""
        return self.base.metrics

    @property
    def options(self) -> Sequence[str] | None:
        """Those of the base: evaluation never asks for anything else than its targets."""
        return self.base.options

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the base."""
        return self.base.splits

    def examples(self, split: str) -> list[Example]:
        """Every example of a split, as many as the base has, under its template."""
        rows = self.base.examples(split)
        fields = [self._fields(row) for row in rows]
        shots = fields if split == "train" else []
        template, few_shot, options = self._evaluation()
        if not shots and few_shot and "train" in self.splits:
            shots = [self._fields(row) for row in self.base.examples("train")]
        drawn = []
        for row in fields:
            if split == "train":
                rng = generator(self.seed, self.name, row["inputs"], row["targets"])
                drawn.append(self._draw(row, shots, rng))
            else:
                rng = generator(self.name, row["inputs"])
                exemplars = _exemplars(row, shots, MAX_EXEMPLARS, rng) if few_shot else []
                drawn.append(_Drawn(row, template, options, exemplars))
        self._fit(drawn)
        return [
            {**row, **each.text(self.base.options)} | _references(row, each)
            for row, each in zip(rows, drawn, strict=True)
        ]

    def content(self) -> dict[str, Any]:
        """What `examples` depends on, as JSON."""
        return {
            "base": self.base.content(),
            "templates": [list(dataclasses.astuple(each)) for each in self.templates.templates],
            "pattern": self.templates.pattern,
            "seed": self.seed,
            "inputs_length": self.inputs_length,
            "evaluation": self.evaluation,
            "law": _LAW,
        }

    def _evaluation(self) -> tuple[Template, bool, bool]:
        """Template, few-shot and options of every split but 'train'."""
        fitting = [each for each in self.templates.templates if not each.inverted]
        if not fitting:
            raise UserError(f"task {self.name!r} has inverted templates only: nothing to evaluate")
        if self.evaluation is None:
            return fitting[0], False, False
        name, *extras = self.evaluation.split("+")
        for extra in extras:
            if extra not in _EXTRAS:
                raise UserError(
                    f"DataConfig.evaluation_template = {self.evaluation!r}: unknown "
                    f"{extra!r}{closest(extra, _EXTRAS)}"
                )
        by_name = {each.name: each for each in fitting}
        if name not in by_name:
            raise UserError(
                f"DataConfig.evaluation_template = {self.evaluation!r}: no such template of task "
                f"{self.base.name!r}{closest(name, by_name)}"
            )
        wants_options = "options" in extras and self.base.options is not None
        return by_name[name], "few_shot" in extras, wants_options

    def _fields(self, row: Example) -> dict[str, str]:
        fields = {"inputs": row["inputs"], "targets": row["targets"]}
        if self.templates.pattern is None:
            return fields
        match = re.fullmatch(self.templates.pattern, row["inputs"], re.DOTALL)
        if match is None:
            raise UserError(
                f"templates of task {self.base.name!r}: the pattern does not fit "
                f"{row['inputs'][:80]!r}"
            )
        return {**fields, **{key: value or "" for key, value in match.groupdict().items()}}

    def _draw(
        self, row: Mapping[str, str], shots: Sequence[Mapping[str, str]], rng: np.random.Generator
    ) -> "_Drawn":
        templates = self.templates.templates
        template = templates[rng.integers(len(templates))]
        few_shot, options = rng.integers(2, size=2)
        count = int(rng.integers(1, MAX_EXEMPLARS + 1))
        return _Drawn(
            row,
            template,
            bool(options) and not template.inverted and self.base.options is not None,
            _exemplars(row, shots, count, rng) if few_shot else [],
        )

    def _fit(self, drawn: Sequence["_Drawn"]) -> None:
        """Leave out what does not fit into the inputs: exemplars, and options before a cut."""
        room = self.inputs_length - 1  # EOS
        labels = self.base.options
        queries = [each.query(labels) + ANSWER * bool(each.exemplars) for each in drawn]
        for each, length in zip(drawn, self._lengths(queries), strict=True):
            if length > room and each.options:
                each.options = False
        queries = [each.query(labels) + ANSWER for each in drawn]
        shots = [each.shots(labels) for each in drawn]
        lengths = iter(self._lengths([shot for each in shots for shot in each]))
        for each, used in zip(drawn, self._lengths(queries), strict=True):
            fitting = []
            # A seam is white space, so the lengths of the parts add up to that of the whole.
            for exemplar in each.exemplars:
                length = next(lengths)
                if used + length <= room:
                    used += length
                    fitting.append(exemplar)
            each.exemplars = fitting

    def _lengths(self, texts: Sequence[str]) -> list[int]:
        return vocabulary.encode(self.vocabulary, texts)[1].tolist() if texts else []


@dataclasses.dataclass
class _Drawn:
    """An example and what was drawn for it."""

    row: Mapping[str, str]
    template: Template
    options: bool
    exemplars: list[Mapping[str, str]]

    def query(self, labels: Sequence[str] | None, row: Mapping[str, str] | None = None) -> str:
        text = self.template.inputs.format_map(self.row if row is None else row)
        return text + OPTIONS + "\n- ".join(labels) if self.options and labels else text

    def shots(self, labels: Sequence[str] | None) -> list[str]:
        return [
            f"{self.query(labels, row)}{ANSWER} {self.template.targets.format_map(row)}{SEPARATOR}"
            for row in self.exemplars
        ]

    def text(self, labels: Sequence[str] | None) -> dict[str, str]:
        query = self.query(labels)
        if self.exemplars:
            query = "".join(self.shots(labels)) + query + ANSWER
        return {"inputs": query, "targets": self.template.targets.format_map(self.row)}


def _exemplars(
    row: Mapping[str, str],
    shots: Sequence[Mapping[str, str]],
    count: int,
    rng: np.random.Generator,
) -> list[Mapping[str, str]]:
    """At most `count` examples, none with the row's text, none twice."""
    found: dict[str, Mapping[str, str]] = {}
    for i in rng.integers(len(shots), size=2 * count) if len(shots) else ():
        other = shots[i]
        if other["inputs"] != row["inputs"] and len(found) < count:
            found.setdefault(other["inputs"], other)
    return list(found.values())


def _references(row: Example, drawn: _Drawn) -> dict[str, str]:
    if "references" not in row or not drawn.template.inverted:
        return {}
    return {"references": drawn.template.targets.format_map(drawn.row)}


@functools.cache
def _shipped() -> Mapping[str, TaskTemplates]:
    return _parse("templates.json", corpus.read_embedded("templates.json"))


def _parse(path: str, raw: bytes) -> Mapping[str, TaskTemplates]:
    try:
        content = parse_json(raw)
    except json.JSONDecodeError as error:
        where = f"templates {path!r}, line {error.lineno}"
        raise UserError(f"{where}: not valid JSON ({error.msg})") from None
    except UnicodeDecodeError:
        raise UserError(f"templates {path!r}: not UTF-8 text") from None
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise UserError(f'templates {path!r}: expected {{"tasks": {{task: …}}}}')
    return {task: _entry(path, task, each) for task, each in content["tasks"].items()}


def _entry(path: str, task: str, each: Any) -> TaskTemplates:
    where = f"templates {path!r}: task {task!r}"
    if not isinstance(each, dict) or not isinstance(each.get("templates"), list):
        raise UserError(f'{where}: expected {{"templates": [{{"name": …, "inputs": …}}]}}')
    _check_keys(where, each, ("pattern", "templates"))
    pattern = each.get("pattern")
    try:
        valid = pattern is None or bool(re.compile(pattern))
    except (re.error, TypeError) as error:
        raise UserError(f"{where}: pattern {pattern!r} is no regular expression: {error}") from None
    assert valid
    templates = []
    for number, entry in enumerate(each["templates"], 1):
        strings = isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values())
        if not strings or not {"name", "inputs"} <= set(entry):
            raise UserError(f"{where}: template {number} needs the strings 'name' and 'inputs'")
        _check_keys(f"{where}: template {number}", entry, ("name", "inputs", "targets"))
        templates.append(Template(**entry))
    if not templates:
        raise UserError(f"{where} has no template")
    return TaskTemplates(tuple(templates), pattern)


def _check_keys(where: str, entry: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in entry:
        if key not in known:
            raise UserError(f"{where}: unknown {key!r}{closest(key, known)}")


def _check(path: str, task: str, found: TaskTemplates) -> None:
    """Names are used once, and texts have the task's fields in them and nothing else."""
    groups = re.compile(found.pattern).groupindex if found.pattern else ()
    known = {"inputs", "targets", *groups}
    names: set[str] = set()
    for template in found.templates:
        where = f"templates {path!r}: template {template.name!r} of task {task!r}"
        if not re.fullmatch(r"\w+", template.name) or template.name in names:
            raise UserError(f"{where}: a name is letters, digits and underscores, and used once")
        names.add(template.name)
        for text in (template.inputs, template.targets):
            try:
                parts = string.Formatter().parse(text)
                fields = [part[1:] for part in parts if part[1] is not None]
            except ValueError as error:
                raise UserError(f"{where}: {text!r}: {error}; write {{{{ for a brace") from None
            for field, specification, conversion in fields:
                if field not in known or specification or conversion:
                    raise UserError(f"{where} has no field {field!r}{closest(str(field), known)}")
            if not fields:
                raise UserError(f"{where}: {text!r} has no {{field}} of the example in it")
