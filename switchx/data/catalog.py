"""What a name stands for: the configuration's own declarations, and those that come with switchx.

Tasks that Python code has put into seqio's registries are not here: see `registry`.
"""

import dataclasses
from typing import TYPE_CHECKING

from switchx.data import facts, glue, instructions, mixtures, tasks
from switchx.data.facts import FactsTask
from switchx.data.glue import GlueTask
from switchx.data.instructions import SUFFIX, InstructionTask
from switchx.data.mixtures import Mixture
from switchx.data.tasks import EmbeddedTask, FileTask, TfdsTask
from switchx.errors import UserError

if TYPE_CHECKING:
    from switchx.data.pipeline import DataConfig

Declared = EmbeddedTask | FileTask | TfdsTask | FactsTask | GlueTask | InstructionTask
# Tasks that come with switchx.
_TASKS = {**tasks.EMBEDDED, **facts.TASKS, **glue.TASKS}
# Names that declarations of the user's own must not take.
NAMES = frozenset((*_TASKS, *mixtures.NAMED))
NAMES |= {f"{name}{SUFFIX}" for name in _TASKS}


def find_task(config: "DataConfig", name: str) -> Declared | None:
    """The declaration of a task; None if there is none of this name.

    Raises:
      UserError: a template file that does not do.
    """
    if config.templates is not None:
        _templates(config)  # also where no task of this run uses them
    own = {declared.name: declared for declared in config.tasks}
    if name in own:
        found = own[name]
        return None if isinstance(found, Mixture) else found
    if name in glue.TASKS:
        return dataclasses.replace(glue.TASKS[name], data_dir=config.tfds_data_dir)
    if name in _TASKS:
        return _TASKS[name]
    base_name = name.removesuffix(SUFFIX)
    if base_name == name:
        return None
    templates = _templates(config).get(base_name)
    base = find_task(config, base_name)
    if templates is None or base is None or isinstance(base, InstructionTask):
        return None
    return InstructionTask(
        base,
        templates,
        seed=config.seed,
        inputs_length=config.task_feature_lengths["inputs"],
        vocabulary=config.vocabulary,
        evaluation=config.evaluation_template,
    )


def find_mixture(config: "DataConfig", name: str) -> Mixture | None:
    """The declaration of a mixture; None if there is none of this name.

    Raises:
      UserError: a mixture in it.
    """
    own = {declared.name: declared for declared in config.tasks}
    found = own.get(name, mixtures.NAMED.get(name))
    if not isinstance(found, Mixture):
        return None
    for task in found.tasks:
        if task in mixtures.NAMED or isinstance(own.get(task), Mixture):
            raise UserError(f"mixture {name!r} contains mixture {task!r}; name its tasks")
    return found


def names(config: "DataConfig") -> set[str]:
    """Every name that `find_task` or `find_mixture` knows."""
    own = {declared.name for declared in config.tasks}
    known = {*own, *_TASKS, *mixtures.NAMED}
    return known | {f"{name}{SUFFIX}" for name in _templates(config)}


def needs_tensorflow(declared: Declared) -> bool:
    """Whether reading the task's examples takes TensorFlow."""
    if isinstance(declared, InstructionTask):
        return needs_tensorflow(declared.base)
    return isinstance(declared, TfdsTask | GlueTask)


def _templates(config: "DataConfig") -> dict[str, instructions.TaskTemplates]:
    own = (declared.name for declared in config.tasks)
    return instructions.load(config.templates, {*_TASKS, *own})
