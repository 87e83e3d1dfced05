"""The command line: one verb per step of the flow, no logic of its own. The only room that prints.

Each verb is a dataclass whose fields are its flags (by tyro); a method's own options are the fields of its config.
Nothing heavy is imported before a verb runs.
"""

from __future__ import annotations

import sys
from dataclasses import make_dataclass
from typing import Annotated, Any

import tyro

from netgloss.cli.flags import FLAT
from netgloss.cli.terminal import is_main_process
from netgloss.cli.verbs import VERBS
from netgloss.errors import UserError, nearest, one_line
from netgloss.trust import trusting

_WITH_METHOD = ("explain", "fit")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with 0, 2 (a user's mistake, one line on stderr) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    trusted = "--trust-code" in arguments
    try:
        with trusting(trusted):
            _dispatch([a for a in arguments if a != "--trust-code"])
    except UserError as error:
        if is_main_process():
            print(f"netgloss: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        if error.filename is None:  # not about a file that somebody named
            raise
        if is_main_process():
            print(f"netgloss: {one_line(error.filename)[:300]}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nnetgloss: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return
    if any("\0" in argument for argument in arguments):
        raise UserError("an argument holds a null character")
    verb, rest = (arguments or ["--help"])[0], arguments[1:]
    if verb == "--version":
        from importlib.metadata import version

        print(version("netgloss"))
        return
    if verb not in VERBS:
        raise UserError(f"unknown command {verb!r}; did you mean {', '.join(nearest(verb, VERBS) or VERBS)}?")
    if verb in _WITH_METHOD:
        _run_with_method(verb, rest)
        return
    if verb == "capture":
        from netgloss.activations import CaptureOptions

        parsed, options = _parse(verb, rest, VERBS[verb], CaptureOptions)
        parsed.run(options)
    elif hasattr(VERBS[verb], "more"):
        _run_with_more(verb, rest)
    else:
        tyro.cli(VERBS[verb], prog=f"netgloss {verb}", args=rest).run()


def _run_with_method(verb: str, rest: list[str]) -> None:
    from netgloss.explainers.names import explainer_names, find_explainer

    cls = VERBS[verb]
    if rest and not rest[0].startswith("-"):
        parsed, config = _parse(f"{verb} {rest[0]}", rest[1:], cls, find_explainer(rest[0]).Config)
        parsed.run(rest[0], config)
        return
    names = ", ".join(explainer_names())
    if rest and rest[0] not in ("-h", "--help"):
        raise UserError(f"say the method first: netgloss {verb} METHOD {rest[0]} ...; methods: {names}")
    print(
        f"usage: netgloss {verb} METHOD [flags]\n\n{cls.__doc__}\n\nmethods: {names}, or path/to/file.py:Class\n"
        f"flags of a method: netgloss {verb} METHOD --help"
    )


def _run_with_more(verb: str, rest: list[str]) -> None:
    """A verb whose ``more()`` names dataclasses: their fields are flags, their values arguments of its ``run``."""
    kinds = VERBS[verb].more()  # type: ignore[attr-defined]
    joined = make_dataclass("More", [(name, Annotated[kind, FLAT]) for name, kind in kinds.items()])
    parsed, more = _parse(verb, rest, VERBS[verb], joined)
    parsed.run(**{name: getattr(more, name) for name in kinds})


def _parse(what: str, arguments: list[str], verb: type, more: type) -> tuple[Any, Any]:
    """The verb's flags and those of a second dataclass (a method's config), side by side."""
    both = make_dataclass(
        f"{verb.__name__}_{more.__name__}", [("verb", Annotated[verb, FLAT]), ("more", Annotated[more, FLAT])]
    )
    both.__doc__ = verb.__doc__
    parsed: Any = tyro.cli(both, prog=f"netgloss {what}", args=arguments)
    return parsed.verb, parsed.more


def _overview() -> str:
    lines = [
        "usage: netgloss COMMAND [flags]",
        "",
        "Explains trained image classifiers by concepts, and says how far each number can be trusted.",
        "",
        *(f"  {name:<12}{(cls.__doc__ or '').strip()}" for name, cls in VERBS.items()),
        "",
        "--trust-code lets the run or store that a command reads name Python files to run (own networks and methods).",
        "netgloss COMMAND --help lists a command's flags. To begin: netgloss demo --out demo",
    ]
    return "\n".join(lines)
