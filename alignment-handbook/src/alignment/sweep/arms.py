"""The arms of a sweep: settings of a recipe that differ, each checked by the parser of the runs themselves."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment import output
from alignment.configs import Configs, parse_configs
from alignment.errors import UserError
from alignment.recipe import OLD_KEYS, PLAN_KEYS
from alignment.recipe.flags import check_known, known_flags

REWARD, PREFERENCE = "run_reward.py", "run_preference.py"
#: Keys that a sweep sets itself, run by run.
OWN_KEYS = "seed output_dir ref_logps_dir samples_before_dir resume_from_checkpoint overwrite_output_dir".split()
#: Keys that ask for something else than a run.
_NO_RUN = ("show_batch", *PLAN_KEYS)

Settings = Mapping[str, str]


@dataclass(frozen=True)
class Arm:
    """Settings that are run with several seeds.

    Attributes:
        name: Tells it from the others; the name of its folder.
        script: `run_reward.py` or `run_preference.py`.
        recipe: Path of the recipe.
        settings: Values of keys, as on the command line, that replace the recipe's.
        resolved: The whole recipe with them and the first seed.
        given: The keys of it that are no defaults.
    """

    name: str
    script: str
    recipe: str
    settings: Settings
    resolved: Mapping[str, Any]
    given: frozenset[str]

    @property
    def runs_as(self) -> str:
        """The script, and which pairs it is given."""
        pairs = self.resolved.get("make_pairs")
        return f"{self.script} --make_pairs={pairs}" if pairs else self.script


def make_arms(
    recipe: str, swept: Sequence[str], listed: Sequence[Sequence[str]] = (), script: str = "auto"
) -> list[Arm]:
    """All combinations of the values of the swept keys, for each listed arm if there are some.

    Args:
        recipe: Path of the recipe.
        swept: `key=value,value`, one a key.
        listed: Arms whose keys change together: of each `key=value`, one a key.
        script: Of all runs; "auto" takes `run_preference.py` for losses of two responses and where `make_pairs` is
            set, else `run_reward.py`.

    Raises:
        UserError: A key is not known, stands twice or is not for a sweep, a value cannot be parsed, or two arms are
            the same.
    """
    columns = parse_settings(swept, "--set")
    rows = [{key: one_value(key, values) for key, values in parse_settings(words, "--arm").items()} for words in listed]
    for row in rows:
        if twice := row.keys() & columns.keys():
            raise UserError(f"--arm: {min(twice)} is in --set too; give it in one of them")
    products = [dict(zip(columns, values, strict=True)) for values in itertools.product(*columns.values())]
    combined = [row | product for row in rows or [{}] for product in products]
    arms = [make_arm(recipe, name, given, script) for name, given in zip(_names(combined), combined, strict=True)]
    _check_different(arms)
    return arms


def parse_settings(words: Sequence[str], flag: str) -> dict[str, list[str]]:
    """The values of each key: `["beta=0.1,0.5", "loss_type=NCA"]` to `{"beta": ["0.1", "0.5"], "loss_type": ["NCA"]}`.

    A comma inside brackets does not part values.

    Args:
        words: As on the command line.
        flag: The flag that they follow, for errors.

    Raises:
        UserError: A word is not of that form, or names a key that is not known, stands twice, or is not for a sweep.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        key = key.removeprefix("--").replace("-", "_")
        if not equals:
            raise UserError(f"{flag}: {word!r} is no key=value; write {flag} beta=0.1,0.5")
        check_known(key, [*known_flags(), *OLD_KEYS], flag)
        if key in OWN_KEYS:
            raise UserError(f"{flag}: {key} is set by the sweep itself, from --seeds and --output_dir; leave it out")
        if key in _NO_RUN:
            raise UserError(f"{flag}: {key} asks for no run; leave it out")
        if key in found:
            raise UserError(f"{flag}: {key} stands twice; write all its values behind one: {key}=value,value")
        found[key] = list(_split(values))
    return found


def one_value(key: str, values: Sequence[str]) -> str:
    """The value of a key of `--arm`.

    Raises:
        UserError: There are several.
    """
    if len(values) > 1:
        raise UserError(f"--arm: {key} has {len(values)} values; an arm has one of each key, --set takes several")
    return values[0]


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as flags of a run; `[a, b]` is a list.

    Example:
        >>> as_flags({"beta": "0.1", "lora_target_modules": "[q_proj, v_proj]"})
        ['--beta=0.1', '--lora_target_modules', 'q_proj', 'v_proj']
    """
    flags = []
    for key, value in settings.items():
        is_list = isinstance(value, str) and value.startswith("[") and value.endswith("]") and "{" not in value
        flags += [f"--{key}", *(item.strip() for item in _split(value[1:-1]))] if is_list else [f"--{key}={value}"]
    return flags


def make_arm(recipe: str, name: str, settings: Settings, script: str) -> Arm:
    """An arm, checked by the parser of the runs. For arguments and errors see `Arm` and `make_arms`."""
    configs = _parse(recipe, settings)
    if script == "auto":
        is_pairwise = configs.trainer.loss.num_responses == 2
        script = PREFERENCE if is_pairwise or configs.data.make_pairs else REWARD
        if is_pairwise and not configs.data.make_pairs:
            settings = {**settings, "make_pairs": "best_worst"}
            configs = _parse(recipe, settings)
    return Arm(name, script, recipe, settings, output.resolve(configs), frozenset(configs.run.given))


def _parse(recipe: str, settings: Settings) -> Configs:
    return parse_configs([recipe, *as_flags(settings), "--output_dir=."])


def _check_different(arms: Sequence[Arm]) -> None:
    for one, other in itertools.combinations(arms, 2):
        if one.name == other.name or (one.script, one.resolved) == (other.script, other.resolved):
            raise UserError(f"two arms are the same: {one.name} and {other.name}; leave one of them out")


def _names(combined: Sequence[Settings]) -> list[str]:
    """What tells the arms apart, fit for a folder's name: the loss, and `key=value` of what is not the same in all."""
    keys = {key for settings in combined for key in settings}
    differing = {key for key in keys if len({settings.get(key) for settings in combined}) > 1} or keys

    def name(settings: Settings) -> str:
        shown = sorted((key for key in settings if key in differing), key=lambda key: key != "loss_type")
        parts = [f"{key}={settings[key]}".removeprefix("loss_type=") for key in shown]
        return re.sub(r"[^\w.=+-]+", "_", "-".join(parts)) or "recipe"

    return [name(settings) for settings in combined]


def _split(values: str) -> Iterator[str]:
    """Parts between the commas that are in no brackets."""
    depth = start = 0
    for at, letter in enumerate(values):
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not depth:
            yield values[start:at]
            start = at + 1
    yield values[start:]
