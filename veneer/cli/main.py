"""The program `veneer`: its commands, and what happens when the command itself is mistyped."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from veneer.cli.command import parser
from veneer.cli.output import OK, answer, fail, version
from veneer.errors import UnknownName, VeneerError, nearest

COMMANDS = {
    "train": ("train", "Adapt a model to data. The same command goes on with an interrupted run."),
    "compare": ("compare", "Train several methods on the same data and show which one won."),
    "prefer": ("prefer", "Train on pairs of better and worse answers (DPO), any method. The same command goes on with an interrupted run."),
    "evaluate": ("use", "Measure a finished run on its test rows or on other data."),
    "predict": ("use", "Answer bare inputs with a finished run."),
    "summaries": ("summaries", "Show a stay's events and the summary that a finished run writes of them, on a page of this machine."),
    "judge": ("judge", "Compare a run's answers with the untouched base's or another run's: by a judge, and by the facts they hold."),
    "merge": ("export", "Write the adapter into the model's weights: a plain model that needs no veneer."),
    "export": ("export", "Write an adapter in another form: Hugging Face PEFT's, veneer's, or merged into the model."),
    "inspect": ("folder", "Show what an adapter's folder holds: method, base model, sites, sizes, training."),
    "methods": ("methods", "List the methods."),
    "show": ("methods", "Show one method: formula, tensors, hyper-parameters, and the count for a model."),
    "tasks": ("tasks", "List the kinds of problems `--task` takes, or one's own settings."),
    "budget": ("budget", "Match methods by size: the hyper-parameters of each that land nearest to a number of trained parameters."),
    "fewshot": ("fewshot", "Compare the cost of examples in the prompt with that of a trained adapter: FLOPs, seconds, storage, memory."),
    "study": ("study", "Repeat a published comparison on your model and data: code-generation or unit-tests. The same command goes on."),
    "scaling-law": (
        "scaling_law",
        "Fit the scaling law of sparse models: prune while training at several sizes, sparsities and lengths, or --fit a file.",
    ),
    "anatomy": ("anatomy", "Print a model's tree of roles with shapes."),
    "doctor": ("doctor", "Check the installation: versions, builds that do not fit, devices, carriers of models and data."),
}
"""Command → the module of this package that holds the function of the same name, and what it does: `--help` imports none of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code: 0 done, 1 a fault of the library, 2 a mistake to mend, 3 the machine, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("--help", "-h", "help"):
        print(overview())
        return OK
    if args[0] == "--version":
        print(f"veneer {version()}")
        return OK
    try:
        function = command(args[0])
        given = parser(args[0], function).read(args[1:])
    except SystemExit:  # argparse has printed the help
        return OK
    except VeneerError as error:
        return fail(error, sys.stdout if "--json" in args else None)
    quiet()
    as_json, debug = given.pop("as_json"), given.pop("debug")
    return answer(lambda: function(**given), as_json, debug)


def command(name: str) -> Callable[..., Any]:
    """The function behind a command; its module is imported only now. Raises `UnknownName` with the nearest commands."""
    if name not in COMMANDS:
        raise UnknownName(f"There is no command {name!r}.{nearest(name, COMMANDS)} `veneer --help` lists them all.")
    return getattr(importlib.import_module(f"veneer.cli.{COMMANDS[name][0]}"), name.replace("-", "_"))


def quiet() -> None:
    """Keeps reports of libraries about themselves off the screen."""
    import logging
    import os

    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def overview() -> str:
    """What `veneer --help` prints."""
    lines = [f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: veneer COMMAND …",
            "",
            "Parameter-efficient fine-tuning: a thin, trained layer over a frozen pretrained model.",
            "",
            *lines,
            "",
            "Every command has --help, --json (one JSON document on stdout) and --debug (tracebacks).",
            "Exit codes: 0 done, 1 a fault of the library, 2 a mistake to mend, 3 the machine (disk, memory, a missing package),",
            "130 interrupted.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
