"""Additions of a user's own: evals, gates, steering methods and more, from a file or an installed package.

A plugin is code, and runs only if the user named it: as a flag, in a file of settings, or to the library. The folder of
a run names plugins too. Those do not run by themselves: see `require_plugins` in runs/resume.py.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from steer_heal.errors import Problems, UserError, nearest, problem_lines
from steer_heal.inputs.files import DataFile, read_file, resolve
from steer_heal.settings import RunConfig

if TYPE_CHECKING:  # torch: seconds
    from steer_heal.evals.base import Eval
    from steer_heal.model.adapter import Adapter
    from steer_heal.model.divergence import Divergence
    from steer_heal.model.steering import Method
    from steer_heal.stages.filter import Gate

GROUP = "steer_heal.plugins"
"""Group of the entry points of installed plugins."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What a plugin adds, by the names that the settings take. The function `plugin` of its module returns one."""

    evals: Mapping[str, Eval] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    methods: Mapping[str, Method] = field(default_factory=dict)
    divergences: Mapping[str, Divergence] = field(default_factory=dict)
    adapters: Mapping[str, type[Adapter]] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where a plugin comes from. Its code has not run."""

    given: str
    """As the setting `plugin` names it."""
    file: DataFile
    entry: EntryPoint | None = None

    @property
    def name(self) -> str:
        return name_of(self.given)


@dataclass(frozen=True)
class Loaded:
    """The plugins of some settings."""

    plugins: tuple[Plugin, ...]
    sha256: Mapping[str, str]
    """SHA-256 of the file of each plugin, as `plugin.<name>`."""

    def use(self) -> None:
        """Puts these additions in the tables, in place of those of other plugins."""
        tables = {kind: table for kind, (table, _) in _tables().items()}
        for kind, name in _added:
            tables[kind].pop(name, None)
        _added.clear()
        for plugin in self.plugins:
            for kind, table in tables.items():
                table.update(getattr(plugin, kind))
                _added.update((kind, name) for name in getattr(plugin, kind))


_added: set[tuple[str, str]] = set()
"""The entries of the tables that are of plugins."""


def _tables() -> dict[str, tuple[dict[str, Any], type]]:
    """For each field of Plugin: the table that it extends, and the type of its values."""
    from steer_heal.evals import EVALS
    from steer_heal.evals.base import Eval
    from steer_heal.model.divergence import DIVERGENCES, Divergence
    from steer_heal.model.steering import METHODS, Method
    from steer_heal.model.student import ADAPTERS
    from steer_heal.stages.filter import GATES, Gate

    return {
        "evals": (EVALS, Eval),
        "gates": (GATES, Gate),
        "methods": (METHODS, Method),
        "divergences": (DIVERGENCES, Divergence),
        "adapters": (ADAPTERS, type),
    }


# --- where a plugin is -------------------------------------------------------------------------------------------
def name_of(given: str) -> str:
    """The name of a plugin: that of its file without .py, or of its entry point."""
    return Path(given).stem if given.endswith(".py") else given


def find(given: str) -> Source:
    """A plugin by its file or entry point, read and not run. UserError if there is none."""
    if given.endswith(".py"):
        return Source(given, read_file(resolve(given, "plugin")))
    known = {each.name: each for each in entry_points(group=GROUP)}
    if given not in known:
        fix = f"{nearest(given, known)}, or give" if known else "give"
        raise UserError(f"plugin is {given!r}: no installed package has it; {fix} a file whose name ends in .py")
    return Source(given, read_file(_module_file(known[given])), known[given])


def _module_file(entry: EntryPoint) -> Path:
    """The file of an entry point's module, without running its package. UserError if there is none."""
    top, *below = entry.module.split(".")
    spec = importlib.util.find_spec(top)
    name = top
    for part in below:
        name = f"{name}.{part}"
        spec = spec and PathFinder.find_spec(name, spec.submodule_search_locations)
    if spec is None or not spec.has_location or spec.origin is None:
        raise UserError(f"plugin is {entry.name!r}: its package has no module {entry.module!r}; install it again")
    return Path(spec.origin)


# --- running it --------------------------------------------------------------------------------------------------
def load(cfg: RunConfig) -> Loaded:
    """Runs the plugins of the settings, and puts their additions in the tables. UserError with a line for each plugin
    that cannot be used, and for each setting of a plugin that is wrong."""
    problems = Problems()
    sources: dict[str, Source] = {}
    for given in cfg.plugin:
        with problems.noted():
            source = find(given)
            if source.name in sources:
                raise UserError(f"plugin is {given!r}: there is another {source.name!r}; rename one of them")
            sources[source.name] = source
    problems.raise_if_any()
    values: dict[str, dict[str, str]] = {name: {} for name in sources}
    for word in cfg.plugin_set:
        place, equals, value = word.partition("=")
        name, dot, key = place.rpartition(".")
        if not (equals and dot):
            problems.found.append(f"plugin_set is {word!r}: it must be NAME.KEY=VALUE")
        elif name not in values:
            problems.found.append(f"plugin_set is {word!r}: no plugin {name!r} was given; add --plugin {name}.py")
        else:
            values[name][key] = value
    made = [problems.attempt(_made, source, values[source.name]) for source in sources.values()]
    problems.raise_if_any()
    plugins = tuple(plugin for plugin in made if plugin is not None)
    problems.found += _clashes(dict(zip(sources, plugins, strict=True)))
    problems.raise_if_any()
    loaded = Loaded(plugins, {f"plugin.{name}": source.file.sha256 for name, source in sources.items()})
    loaded.use()
    return loaded


@functools.cache
def _module(source: Source) -> ModuleType:
    """The module of a plugin, run once for each content of its file."""
    if source.entry is not None:
        return importlib.import_module(source.entry.module)
    module = ModuleType(f"steer_heal_plugin_{source.name}")
    module.__file__ = str(source.file.path)
    sys.modules[module.__name__] = module  # dataclasses look for their module there
    exec(compile(source.file.text, module.__file__, "exec"), module.__dict__)
    return module


def _made(source: Source, values: Mapping[str, str]) -> Plugin:
    """What a plugin adds with these values of its settings."""
    try:
        module = _module(source)
        make = getattr(module, "plugin", None)
        if make is None:
            raise UserError(f"plugin is {source.given!r}: it has no function plugin; write one (docs/extend.md)")
        kind = getattr(module, "Cfg", None)
        made = make(*([] if kind is None and not values else [_settings(source, kind, values)]))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"plugin is {source.given!r}: it {_raised(source, error)}; mend it") from error
    if not isinstance(made, Plugin):
        raise UserError(f"plugin is {source.given!r}: its function plugin returned {made!r:.80}; return a Plugin")
    for field_name, (_, of) in _tables().items():
        for name, value in getattr(made, field_name).items():
            if not isinstance(value, of):
                raise UserError(
                    f"plugin is {source.given!r}: {field_name} has {name!r}: {value!r:.80}; it must be of type "
                    f"{of.__name__}"
                )
    return replace(
        made,
        evals={name: _guarded_eval(source, name, each) for name, each in made.evals.items()},
        gates={
            name: replace(each, score=_guarded(source, f"gate {name}", each.score)) for name, each in made.gates.items()
        },
        methods={
            name: each._replace(extract=_guarded(source, f"method {name}", each.extract))
            for name, each in made.methods.items()
        },
    )


def _guarded_eval(source: Source, name: str, own: Eval) -> Eval:
    """An eval whose faults are UserErrors: what it raises, and items that its metrics need and it does not return."""
    items = _guarded(source, f"eval {name}", own.items)

    def checked(subject: Any) -> Any:
        found = items(subject)
        if missing := sorted({metric.item for metric in own.metrics} - {*found}):
            raise UserError(
                f"plugin {source.name!r}: eval {name} returns the items {', '.join(found) or 'none'}, and its metrics "
                f"need {', '.join(missing)}; mend it and start a new run",
                resumable=False,
            )
        return found

    return replace(own, items=checked)


def _guarded(source: Source, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a plugin whose exceptions are UserErrors that name its line. Memory that runs out is left to the
    caller, who tries again with less."""

    @functools.wraps(function)
    def called(*args: Any, **named: Any) -> Any:
        try:
            return function(*args, **named)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            from steer_heal.model.memory import ran_out  # torch: seconds

            if isinstance(error, RuntimeError) and ran_out(error):
                raise
            raise UserError(
                f"plugin {source.name!r}: {what} {_raised(source, error)}; mend it and start a new run", resumable=False
            ) from error

    return called


def _raised(source: Source, error: Exception) -> str:
    """`raised ValueError: boom (my_eval.py, line 6)`."""
    lines = [
        each.lineno for each in traceback.extract_tb(error.__traceback__) if each.filename == str(source.file.path)
    ]
    where = f" ({source.file.path.name}, line {lines[-1]})" if lines else ""
    return f"raised {type(error).__name__}: {error}{where}"


def _settings(source: Source, kind: type | None, values: Mapping[str, str]) -> Any:
    """The dataclass `Cfg` of a plugin with its values. UserError with a line for each wrong name or value."""
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise UserError(f"plugin is {source.given!r}: it has no settings (no dataclass Cfg); leave out plugin_set")
    known = [each.name for each in fields(kind)]
    unknown = [f"plugin_set has {source.name}.{key}: {nearest(key, known)}" for key in values if key not in known]
    if unknown:
        raise UserError(*unknown)
    try:
        return TypeAdapter(kind).validate_strings(dict(values))
    except ValidationError as error:
        lines = problem_lines(error, kind, lambda at: f"{source.name}.{at}" if at else source.name)
        raise UserError(*(f"plugin_set: {line}" for line in lines)) from None


def _clashes(plugins: Mapping[str, Plugin]) -> Iterator[str]:
    """A line for each name that is taken already: of an addition, or of a metric of an eval."""
    tables = _tables()
    taken = {kind: {name for name in table if (kind, name) not in _added} for kind, (table, _) in tables.items()}
    evals, _ = tables["evals"]
    taken["metrics"] = {metric.name for name in taken["evals"] for metric in evals[name].metrics}
    for owner, plugin in plugins.items():
        own: dict[str, Sequence[str]] = {kind: tuple(getattr(plugin, kind)) for kind in tables}
        own["metrics"] = [metric.name for each in plugin.evals.values() for metric in each.metrics]
        for kind, names in own.items():
            for name in names:
                if name in taken[kind]:
                    yield f"plugin {owner!r} adds {name!r} to the {kind}: there is one of this name; give it another"
                taken[kind].add(name)
