"""Every strategy × every method: one cell, one test. Strategies are found in the registry, like methods."""

from __future__ import annotations

import copy
import functools
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from case import Case
from laws import base_tensors, trained
from tiny import loss
from torch import Tensor

import veneer
from veneer import registry
from veneer.errors import Unsupported
from veneer.tuned import Tuned

MATRIX = Path(veneer.__file__).with_name("matrix.json")
STRATEGIES = [card.slug for card in veneer.methods() if card.family == "strategy" and not registry.load(card.slug).mixes]
METHODS = [card.slug for card in veneer.methods() if card.family != "strategy"]
SETTINGS: dict[str, dict[str, Any]] = {"id3": {"B": 0.3}, "ist": {"T_u": 2}}
"""Hyper-parameters with which a strategy shows in three steps; the defaults for those not named."""
STEPS, TOTAL = 3, 6


class Run:
    """The plain loop with Adam, which a strategy is driven by."""

    def __init__(self, case: Case, tuned: Tuned) -> None:
        self.case, self.tuned, self.model = case, tuned, tuned.model.train()
        self.optimiser = torch.optim.Adam(tuned.param_groups(1e-2))
        tuned.begin(TOTAL, probe=self.loss)

    def loss(self) -> Tensor:
        return loss(self.model, self.case.batch())

    def step(self) -> float:
        self.optimiser.zero_grad()
        value = self.loss()
        sum([value, *self.tuned.loss_terms().values()]).backward()  # type: ignore[union-attr, arg-type]
        self.tuned.before_step()
        self.optimiser.step()
        self.tuned.after_step()
        return float(value.detach())


@functools.cache
def alone(slug: str, seed: int) -> tuple[Case, Tensor, Tensor]:
    """The method on its home, what the base answers there, and what the method does fresh, without a strategy."""
    case = Case(slug, seed)
    model = case.base()
    base = case.answers(model)
    case.attach(model, seed=seed)
    return case, base, case.answers(model)


@pytest.mark.parametrize("slug", METHODS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pair(strategy: str, slug: str, seed: int, record_property: Callable[[str, Any], None]) -> None:
    """They train together, save, resume and go without a trace; or the strategy says no for a reason that it declares."""
    record_property("pair", (strategy, slug, True))
    added = registry.method(strategy, **SETTINGS.get(strategy, {}))
    case = alone(slug, seed)[0]
    try:
        run = Run(case, case.attach(case.base(), seed=seed, method=case.method + added))
    except Unsupported as refused:
        reasons = [reason for reason in added.limits.values() if reason in str(refused)]
        assert reasons, f"{strategy} refused {slug} for a reason it does not declare: {refused}"
        record_property("pair", (strategy, slug, reasons[0]))
    else:
        works(run, *alone(slug, seed))


def works(run: Run, case: Case, bare: Tensor, fresh: Tensor) -> None:
    tuned, model = run.tuned, run.model
    assert torch.equal(case.answers(model.eval()), fresh), "the strategy changes the fresh outputs"
    base, before = {n: p.detach().clone() for n, p in base_tensors(model).items()}, trained(tuned)
    model.train()
    losses = [run.step() for _ in range(STEPS)]
    assert all(math.isfinite(value) for value in losses), losses
    assert any(not torch.equal(t, before[key]) for key, t in trained(tuned).items()), "nothing changed"
    for name, p in base_tensors(model).items():
        assert torch.equal(p, base[name]), f"training changed the base at {name}"
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        again = veneer.load(case.base(), folder)
    assert torch.equal(case.answers(again.model), case.answers(model.eval())), "saved and loaded, it answers differently"
    resumes(run, Run(case, again))
    plain = tuned.remove("default").detach()
    assert all(torch.equal(p, base[name]) for name, p in plain.named_parameters()) and torch.equal(case.answers(plain.eval()), bare)


def resumes(run: Run, again: Run) -> None:
    """A fresh adapter with the tensors and the states of this moment takes the very same next step."""
    run.model.train()
    again.optimiser.load_state_dict(copy.deepcopy(run.optimiser.state_dict()))
    again.tuned.load_strategy_state(copy.deepcopy(run.tuned.strategy_state()))
    assert run.step() == again.step()
    there = trained(again.tuned)
    for key, t in trained(run.tuned).items():
        assert torch.equal(there[key], t), f"the next step after resuming differs at {key}"


def test_the_table_is_current(request: pytest.FixtureRequest) -> None:
    """veneer/matrix.json has a cell for every strategy and method, and none fails."""
    if request.config.getoption("--write-matrix"):
        return  # it is written when the run ends
    table, again = json.loads(MATRIX.read_text("utf-8")).get("strategies", {}), "run `pytest tests/conformance --write-matrix`"
    assert sorted(table) == sorted(STRATEGIES), again
    for strategy, row in table.items():
        assert sorted(row) == sorted(METHODS), f"{strategy}: {again}"
        assert all(cell is True or (isinstance(cell, str) and cell) for cell in row.values()), strategy
