"""`veneer scaling-law`: how loss follows from sparsity, non-zero weights and data, from runs or from a file."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

from veneer.cli.command import Flag
from veneer.cli.output import table
from veneer.errors import BadValue


def scaling_law(
    fit: Annotated[Path | None, Flag("only fit someone else's runs: CSV or JSON lines with columns S, N (non-zeros), D, L")] = None,
    data: Annotated[str, Flag("text to train on: a file, a folder, or a data set's name")] = "movie-sentiment",
    text: Annotated[str | None, Flag("column of the text", metavar="COLUMN")] = None,
    widths: Annotated[list[int] | None, Flag("sizes: widths of byte decoders trained from scratch (default 16 32 64)", metavar="N")] = None,
    models: Annotated[
        list[str] | None, Flag("sizes: pretrained causal models to fine-tune instead", name="--model", metavar="NAME")
    ] = None,
    sparsities: Annotated[
        list[str] | None, Flag("shares of zeros, or n:m (default 0 0.5 0.75 0.875 2:4)", name="--sparsity", metavar="S")
    ] = None,
    lengths: Annotated[
        list[str] | None, Flag("tokens of training, each a run of its own (default 240k 480k 960k)", name="--length", metavar="D")
    ] = None,
    pretrain: Annotated[str, Flag("tokens that decoders are trained on before, dense, so that runs fine-tune", metavar="D")] = "0",
    layers: Annotated[int, Flag("blocks of the decoders")] = 2,
    context: Annotated[int, Flag("tokens in a row")] = 64,
    batch_size: Annotated[int, Flag("rows of a step")] = 8,
    lr: Annotated[float | None, Flag("highest learning rate (default 0.32 / width; 3e-4 for pretrained models)")] = None,
    tables: Annotated[str, Flag("embedding and output tables", choices=("auto", "dense"))] = "auto",
    nm: Annotated[str, Flag("how n:m comes about: group by group or entry by entry", choices=("groups", "iterative"))] = "groups",
    residual: Annotated[str, Flag("fit logarithms of losses (language) or losses (vision)", choices=("log", "raw"))] = "log",
    delta: Annotated[float | None, Flag("where the Huber loss turns linear (default 0.001 for log, 0.01 for raw)")] = None,
    n_unit: Annotated[float | None, Flag("N is divided by this before the fit (default a power of ten)")] = None,
    d_unit: Annotated[float | None, Flag("D is divided by this before the fit (default a power of ten)")] = None,
    samples: Annotated[int, Flag("samples of the runs behind the intervals, 0 for none")] = 200,
    seed: Annotated[int, Flag("seed of first values, order and fit")] = 0,
    device: Annotated[str, Flag("where to train", choices=("auto", "cpu", "cuda"))] = "auto",
    out: Annotated[Path, Flag("folder of the runs, the report and the plots")] = Path("runs/scaling-law"),
    again: Annotated[bool, Flag("train also what is finished")] = False,
) -> Any:
    """Fit the scaling law of sparse models: prune while training at several sizes, sparsities and lengths, or --fit a file."""
    from veneer.study import scaling_law as module

    fitting = module.Fitting(log=residual == "log", delta=delta, N_unit=n_unit, D_unit=d_unit, times=samples, seed=seed)
    if fit is not None:
        given = {"--widths": widths, "--model": models, "--sparsity": sparsities, "--length": lengths}
        wrong = next((flag for flag, value in given.items() if value), None)
        if wrong:
            raise BadValue(f"--fit {fit} trains nothing, so {wrong} has no place beside it; leave one of the two out.")
        found = module.study_of_file(fit, out / fit.stem, fitting)
    else:
        if widths and models:
            raise BadValue("--widths and --model exclude each other: sizes are either decoders trained here or pretrained models.")
        chosen: dict[str, Any] = {"widths": widths, "models": models, "sparsities": sparsities, "lengths": [*map(counted, lengths or ())]}
        design = module.Design(
            data=data, text=text, layers=layers, context=context, batch_size=batch_size, lr=lr, pretrain=counted(pretrain), tables=tables,
            nm=nm, seed=seed, **{name: tuple(values) for name, values in chosen.items() if values},
        )  # fmt: skip
        found = module.study(design, out, fitting, again=again, device=_device(device), command=_typed())
    for shown in module.tables(found.data):
        print(f"\n{shown.title}\n")
        table(shown.header, shown.rows, right=range(shown.left, len(shown.header)))
        for note in shown.notes:
            print(note)
    for note in found.data["notes"]:
        print(f"\n{note}")
    print(f"\nReport: {found.folder / 'report.html'}")
    return {**found.data, "folder": found.folder}


def counted(text: str) -> int:
    """ "256k" → 256000, also with M and G. Raises `BadValue`."""
    found = re.fullmatch(r"(\d+(?:[._]?\d+)*)([kKmMgG]?)", text)
    if not found:
        raise BadValue(f"{text!r} is not a number of tokens; write it as 256000, 256k or 1.5M.")
    return round(float(found[1].replace("_", "")) * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[found[2].lower()])


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise BadValue("There is no cuda device here. Leave --device out: it would be cpu.")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _typed() -> str:
    """The command that goes on: the one that was typed, without --again."""
    return shlex.join(["veneer", *(a for a in sys.argv[1:] if a != "--again")])
