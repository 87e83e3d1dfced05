"""Methods by name: the files of this folder, or a class in a file of the user's."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path
from typing import Any

from netgloss.errors import UserError, unknown
from netgloss.explainers.base import Explainer, ExplainerConfig
from netgloss.trust import code_file, importing_beside, note_code

_NOT_METHODS = {"base", "class_scores", "image_decoders", "part_maps", "names", "rows", "sparse_autoencoder"}


def explainer_names() -> list[str]:
    """Names of all built-in methods: the files of this folder, with dashes for underscores (nothing is imported)."""
    folder = Path(__file__).parent
    found = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(n.replace("_", "-") for n in found if n not in _NOT_METHODS and not n.startswith("_"))


def find_explainer(method: str) -> type[Explainer]:
    """The class of a method: a built-in name (``"nmf"``) or ``path/to/file.py:Class`` (``file.py`` if it has one)."""
    if ".py" in method:
        return _from_file(method)
    names = explainer_names()
    if method not in names:
        raise unknown("method", method, names)
    module = importlib.import_module(f"netgloss.explainers.{method.replace('-', '_')}")
    return _only_class(module, method)


def method_name(cls: type[Explainer]) -> str:
    """The name under which :func:`find_explainer` finds a class (file and class for those outside netgloss)."""
    if cls.__module__.startswith("netgloss.explainers."):
        return cls.__module__.rsplit(".", 1)[1].replace("_", "-")
    return f"{inspect.getfile(cls)}:{cls.__name__}"


def _from_file(method: str) -> type[Explainer]:
    file, name = code_file(method)
    path = Path(file).resolve()
    if not path.is_file():
        raise UserError(f"method file {file!r} does not exist (asked for by {method!r})")
    note_code(path)
    known = f"netgloss_method_{path.stem}_{abs(hash((path, path.stat().st_mtime_ns)))}"
    module = sys.modules.get(known)
    if module is None:
        spec = importlib.util.spec_from_file_location(known, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[known] = importlib.util.module_from_spec(spec)
        try:
            with importing_beside(path):
                spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[known]
            raise UserError(f"method file {file!r} cannot be imported: {type(error).__name__}: {error}") from error
    if not name:
        return _only_class(module, method)
    cls = getattr(module, name, None)
    if not (inspect.isclass(cls) and issubclass(cls, Explainer)):
        raise UserError(f"{file!r} has no explainer class {name!r}")
    return cls


def _only_class(module: Any, method: str) -> type[Explainer]:
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    classes = [c for c in own if issubclass(c, Explainer) and not c.__name__.startswith("_")]
    if len(classes) != 1:
        names = [c.__name__ for c in classes]
        raise UserError(f"{method!r} must define exactly one explainer class, found {names or 'none'}")
    return classes[0]


def config_from_dict(cls: type[Explainer], values: dict[str, Any]) -> ExplainerConfig:
    """The config of ``cls`` from a JSON dict; unknown names raise."""
    known = {f.name: f for f in dataclasses.fields(cls.Config)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{cls.__name__} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls.Config(**fields)
