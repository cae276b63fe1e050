"""Settings of a run: what differs from its recipe, and the commands that reproduce it."""

import dataclasses
import shlex
from typing import Any

from dmjd.config.pretrain import DURATIONS, RESOLVED, PretrainConfig
from dmjd.config.recipes import RECIPES, get_recipe
from dmjd.evaluation.comparability import flag_words, redo_command
from dmjd.reports.facts import RunFacts

_SHAPE_A_RECIPE = ("img_size", "init", "encoder", "target", "teacher", "teacher_size")  # others follow from them


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting, its group and help; ``recipe`` is the recipe's value if that differs, else None."""

    name: str
    group: str
    help: str
    value: str
    recipe: str | None


def settings_of(config: PretrainConfig) -> list[Setting]:
    """All settings of a run."""
    base = _recipe_of(config)
    rows = []
    for field in dataclasses.fields(config):
        own = getattr(config, field.name)
        theirs = getattr(base, field.name) if base is not None else own
        by_machine = theirs is None and field.name in ("batch_size", "blr")
        differs = own != theirs and not by_machine and field.name not in ("data", "out")
        text, group = field.metadata["help"], field.metadata["group"]
        rows.append(Setting(field.name, group, text, _text(own), _text(theirs) if differs else None))
    return rows


def _recipe_of(config: PretrainConfig) -> PretrainConfig | None:
    """The recipe's own settings for data of this size; None for a recipe that is not known."""
    if config.recipe not in RECIPES:
        return None
    return get_recipe(config.recipe)(config.data, config.out, img_size=config.img_size)


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def pretrain_command(config: PretrainConfig) -> str:
    """The command that starts the same run: its recipe, with flags for the settings that differ from it."""
    recipe = get_recipe(config.recipe if config.recipe in RECIPES else "dmjd")
    plain = recipe(config.data, config.out)
    changes = {name: getattr(config, name) for name in _SHAPE_A_RECIPE if getattr(config, name) != getattr(plain, name)}
    changes = {name: value for name, value in changes.items() if value is not None}
    base = recipe(config.data, config.out, **changes)
    resolved = {field.name for field in dataclasses.fields(config) if field.metadata["group"] == RESOLVED}
    for name, value in vars(config).items():
        if name in resolved or name == "recipe" or value == getattr(base, name):
            continue
        if value is not None:  # another duration, or a setting that only the recipe has, is None
            changes[name] = value
    words = ["dmjd", "pretrain", config.recipe if config.recipe in RECIPES else "dmjd"]
    paths = {name: value for name, value in (("data", config.data), ("out", config.out)) if value is not None}
    if config.recipe == "digits" and config.data == "digits":
        del paths["data"]
    durations = [name for name in DURATIONS if name in changes]
    ordered = {name: changes[name] for name in [*durations, *(n for n in changes if n not in DURATIONS)]}
    return shlex.join([*words, *flag_words(paths | ordered)])


def commands_of(run: RunFacts) -> list[str]:
    """The commands that reproduce a run and its results, and this report."""
    folder = run.path
    evaluations = [redo_command(task, folder, result) for task, result in run.results.items()]
    return [pretrain_command(run.config), *evaluations, shlex.join(["dmjd", "report", str(folder)])]
