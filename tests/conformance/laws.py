"""The laws: each is one column of the method × feature table, stated once for all methods.

A law raises `AssertionError` where it does not hold. `LAWS` keeps them in the table's order.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.utils.checkpoint
from case import LAYER_KINDS, Case, partners, stir
from formulas import FORMULAS
from tiny import ROWS, SUBJECTS, loss
from torch import Tensor, nn

import veneer
from veneer import anatomy
from veneer.calls import Frozen, Link, Rows
from veneer.errors import BadValue, NoMatch, UnknownName, Unsupported
from veneer.forms import form_of
from veneer.method import SelectionMethod, replaced
from veneer.part import LAYERS, Part
from veneer.slot import Slot
from veneer.tuned import Tuned

Law = Callable[[Case], None]
LAWS: dict[str, Law] = {}
EXACT, GRADIENT = 1e-10, 1e-8


def law(function: Law) -> Law:
    LAWS[function.__name__] = function
    return function


# -- measures -------------------------------------------------------------------------------------------------


def close(a: Tensor, b: Tensor, tolerance: float = EXACT) -> None:
    scale = max(float(b.detach().abs().max()), 1.0)
    far = float((a.detach() - b.detach()).abs().max())
    assert far <= tolerance * scale, f"differ by {far:.2e} where {tolerance * scale:.0e} is allowed"


def differ(a: Tensor, b: Tensor, least: float = 1e-6) -> None:
    far = float((a - b).abs().max())
    assert far > least, f"expected different outputs, they differ by {far:.1e}"


def trained(tuned: Tuned, name: str | None = None) -> dict[str, Tensor]:
    return {key: p.detach().clone() for key, p in tuned.named_parameters(name)}


def stored(tuned: Tuned, name: str | None = None) -> dict[str, Tensor]:
    """All tensors of an adapter, frozen ones too."""
    return {f"{site.name}/{i}/{key}": t for i, (site, _, p) in enumerate(tuned.entries(name)) for key, t in p.items()}


def base_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if "veneer" not in n.split(".")}


def gradients(case: Case, model: nn.Module, tuned: Tuned) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradient of every trained tensor, in training mode."""
    model.train()
    value = loss(model, case.batch())
    found = torch.autograd.grad(value, tuned.parameters(), allow_unused=True)
    return value.detach(), [torch.zeros_like(p) if g is None else g for g, p in zip(found, tuned.parameters())]


def descend(case: Case, tuned: Tuned, steps: int = 1, rate: float = 1e-2) -> tuple[float, float]:
    """Loss before and after some Adam steps through the plain loop."""
    model = tuned.model.train()
    batch = case.batch(_dtype(model))
    optimiser = torch.optim.Adam(tuned.param_groups(rate))
    tuned.begin(total_steps=20)
    first = loss(model, batch)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model, batch).backward()
        tuned.before_step()
        optimiser.step()
        tuned.after_step()
    with torch.no_grad():
        return float(first), float(loss(model, batch))


def one_step_helps(case: Case, start: Callable[[], Tuned]) -> None:
    """One Adam step lowers the loss, at one of some usual learning rates at least."""
    tried = []
    for rate in (1e-2, 1e-3, 1e-1, 1e-4, 1.0):
        tuned = start()
        before, after = descend(case, tuned, rate=rate)
        if after < before:
            return
        tried.append(f"{rate}: {before:.8f} → {after:.8f}")
    raise AssertionError("no step lowers the loss: " + "; ".join(tried))


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in base_tensors(model).values() if p.is_floating_point() and p.ndim)


def layer_parts(tuned: Tuned) -> Iterator[tuple[Part, nn.Module, Slot]]:
    """Parts of the active adapter that act on one weight-bearing layer which is called as such."""
    for name in tuned.active:
        for part in tuned.adapters[name].parts:
            module = tuned.model.get_submodule(part.site.module)
            slot = module._modules["veneer"]
            assert isinstance(slot, Slot)
            if part.site.kind in LAYERS and type(slot.forms[part.site.parameter]).__name__ != "ParameterForm":
                yield part, module, slot


# -- the start, and training ----------------------------------------------------------------------------------


@law
def identity(case: Case) -> None:
    """A fresh adapter leaves the outputs as they are."""
    model = case.base()
    before = case.answers(model)
    case.attach(model, seed=case.seed)
    close(case.answers(model), before)


@law
def step(case: Case) -> None:
    """One Adam step lowers the loss; the base stays as it was, bit for bit."""
    one_step_helps(case, lambda: case.attach(case.base(), seed=case.seed))
    model = case.base()
    before = {n: p.detach().clone() for n, p in base_tensors(model).items()}
    descend(case, case.attach(model), steps=2)
    for name, p in base_tensors(model).items():
        assert torch.equal(p, before[name]), f"training changed the base at {name}"


@law
def gradients_law(case: Case) -> None:
    """Gradients reach every trained tensor and nothing else, and are those of finite differences."""
    tuned = case.tuned()
    model = tuned.model.train()
    loss(model, case.batch()).backward()
    ours = {id(p) for p in tuned.parameters()}
    for name, p in model.named_parameters():
        assert id(p) in ours or (p.grad is None and not p.requires_grad), f"a gradient reached the base at {name}"
    arrived: dict[str, bool] = {}
    for key, p in tuned.named_parameters():
        assert p.grad is not None, f"no gradient reached {key}"
        kind = key.rpartition("/")[2]
        arrived[kind] = arrived.get(kind, False) or bool(p.grad.abs().max() > 0)
    assert all(arrived.values()), f"zero gradients: {[k for k, v in arrived.items() if not v]}"
    if "gradients" in case.method.limits:
        _as_defined(case, tuned)
    else:
        _as_differences(case, tuned)


def _as_differences(case: Case, tuned: Tuned) -> None:
    batch, parts = case.batch(), tuned.adapters["default"].parts
    chosen = [p for part in (parts[0], parts[case.seed % len(parts)]) for p in part.tensors().values() if p.requires_grad]
    parameters = list({id(p): p for p in chosen}.values()) or tuned.parameters()[:2]

    def outputs(*_: Tensor) -> Tensor:
        return torch.atleast_1d(loss(tuned.model, batch))

    assert torch.autograd.gradcheck(outputs, parameters, fast_mode=True, check_undefined_grad=False, atol=1e-6, rtol=1e-4)


def _as_defined(case: Case, tuned: Tuned) -> None:
    """Where a method stops some gradient on purpose: the fast path's gradients are those of its own definition."""
    found = 0
    for part, module, slot in layer_parts(tuned):
        call, x = _below(part, module, slot, case.seed)
        p = [t for t in part.tensors().values() if t.requires_grad]
        fast = Link(call, part, slot.forms[part.site.parameter], module)(x)
        dense = call.apply(x, *part.fold(call.weight(), call.bias()))
        towards = torch.randn_like(fast)
        for a, b in zip(torch.autograd.grad(fast, p, towards), torch.autograd.grad(dense, p, towards)):
            close(a, b, GRADIENT)
            found += 1
    assert found or case.subject.name == "encoder", "no layer to compare"


def _below(part: Part, module: nn.Module, slot: Slot, seed: int) -> tuple[Any, Tensor]:
    """The frozen layer beneath a part and a random input for it."""
    generator = torch.Generator().manual_seed(seed)
    site = part.site
    if site.kind == "embedding":
        x = torch.randint(1, site.in_features, (3, 5), generator=generator)  # not the padding id: torch keeps its row out of gradients
    elif site.kind == "conv":
        x = torch.empty(2, module.in_channels, *(9,) * len(site.kernel)).normal_(generator=generator).double()  # type: ignore[call-overload]
    elif site.kind == "norm" and type(module).__name__.endswith("GroupNorm"):
        x = torch.empty(2, site.in_features, 3, 3).normal_(generator=generator).double()
    else:
        x = torch.empty(3, 5, site.in_features).normal_(generator=generator).double()
    call: Any = Frozen(slot, module, form_of(module, site.kind, site.parameter))
    return (Rows(call, site.rows, x, call(x)) if site.rows else call), x


@law
def definition(case: Case) -> None:
    """The fast path is the dense definition: the layer run with the method's folded weight, output and gradients to the input."""
    tuned, found = case.tuned(), 0
    for part, module, slot in layer_parts(tuned):
        call, x = _below(part, module, slot, case.seed)
        if x.is_floating_point() and not part.site.rows:
            x.requires_grad_()
        fast = Link(call, part, slot.forms[part.site.parameter], module)(x)
        dense = call.apply(x, *part.fold(call.weight(), call.bias()))
        close(fast, dense)
        if x.requires_grad:
            towards = torch.randn_like(fast)
            close(torch.autograd.grad(fast, x, towards)[0], torch.autograd.grad(dense, x, towards)[0])
        found += 1
    assert found or case.subject.name == "encoder", "no layer to compare"


# -- files and merging ----------------------------------------------------------------------------------------


@law
def save(case: Case) -> None:
    """Saved and loaded into a fresh model: every tensor and every output bit for bit."""
    tuned = case.tuned()
    before, tensors = case.answers(tuned.model), stored(tuned)
    with tempfile.TemporaryDirectory() as folder:
        tuned.save(folder)
        again = veneer.load(case.base(), folder)
    loaded = stored(again)
    assert list(loaded) == list(tensors), f"{list(loaded)} came back for {list(tensors)}"
    for key, tensor in tensors.items():
        assert torch.equal(loaded[key], tensor) and loaded[key].dtype == tensor.dtype, f"{key} came back changed"
        assert loaded[key].requires_grad == tensor.requires_grad, f"{key} is {'not ' * tensor.requires_grad}trained after loading"
    assert torch.equal(case.answers(again.model), before)
    assert again.adapters["default"].method == tuned.adapters["default"].method


@law
def merge(case: Case) -> None:
    """Merged, the plain model answers as with the adapter; also once everything is detached."""
    tuned = case.tuned()
    model, before = tuned.model, case.answers(tuned.model)
    differ(before, case.answers(case.base()))
    classes = {n: type(m) for n, m in case.base().named_modules()}
    tuned.merge()
    close(case.answers(model), before)
    plain = tuned.detach()
    close(case.answers(plain), before)
    assert {n: type(m) for n, m in plain.named_modules()} == classes


@law
def unmerge(case: Case) -> None:
    """Unmerged, every base tensor is the very one it was, bit for bit."""
    tuned = case.tuned()
    model, before = tuned.model, case.answers(tuned.model)
    tensors = base_tensors(model)
    bits = {n: p.detach().clone() for n, p in tensors.items()}
    tuned.merge().unmerge()
    after = base_tensors(model)
    assert list(after) == list(tensors)
    for name, p in after.items():
        assert p is tensors[name] and torch.equal(p, bits[name]), f"{name} is not what it was"
    assert torch.equal(case.answers(model), before)


# -- several adapters -----------------------------------------------------------------------------------------


@law
def two(case: Case) -> None:
    """Two adapters: switching is exact, training one leaves the other alone, removing both gives the base back."""
    model = case.base()
    plain = case.answers(model)
    tuned = case.tuned("default", model)
    first = case.answers(model)
    case.tuned("b", model)
    second = case.answers(model)
    differ(first, second)
    assert torch.equal(case.answers(tuned.activate("default").model), first)
    assert torch.equal(case.answers(tuned.activate("b").model), second)
    kept = trained(tuned, "default")
    descend(case, tuned, steps=2)
    model.eval()
    differ(case.answers(model), second)
    assert all(torch.equal(t, kept[k]) for k, t in trained(tuned, "default").items())
    assert torch.equal(case.answers(tuned.activate("default").model), first)
    tuned.remove("b")
    assert list(tuned.adapters) == ["default"]
    assert torch.equal(case.answers(model), first)
    tuned.remove("default")
    assert torch.equal(case.answers(model), plain)
    assert all(p.requires_grad for p in tuned.detach().parameters() if p.is_floating_point())


@law
def mixed(case: Case) -> None:
    """Stacked with a method of another family: both act and train, the stack is saved and loaded, and merges if both do."""
    other = next(partners(case), None)
    assert other is not None, "no method of another family attaches to this model"
    for first, second in ((case.method, other), (other, case.method)):
        if isinstance(second, SelectionMethod):  # its copies replace what came before them
            continue
        stack = first + second
        tuned = case.tuned(method=stack)
        model, together = tuned.model, case.answers(tuned.model)
        for index in (0, 1):
            alone = [p for part in tuned.adapters["default"].parts if part.index == index for p in part.tensors().values()]
            differ(_without(case, tuned, alone), together)
        _, found = gradients(case, model, tuned)
        assert all(torch.isfinite(g).all() for g in found)
        model.eval()
        with tempfile.TemporaryDirectory() as folder:
            tuned.save(folder)
            assert torch.equal(case.answers(veneer.load(case.base(), folder).model), together)
        if all(part.foldable for part in stack.parts):
            close(case.answers(tuned.merge().model), together)


def _without(case: Case, tuned: Tuned, tensors: list[Tensor]) -> Tensor:
    """Outputs with these tensors moved, restored afterwards."""
    kept = [t.detach().clone() for t in tensors]
    with torch.no_grad():
        for t in tensors:
            if t.is_floating_point():
                t += 0.1 * torch.randn_like(t)
        out = case.answers(tuned.model)
        for t, old in zip(tensors, kept):
            t.copy_(old)
    return out


@law
def rows(case: Case) -> None:
    """Every row of one batch has its own adapter, or none, and answers as if it were alone; gradients too."""
    model = case.base()
    tuned = case.tuned("default", model)
    case.tuned("b", model)
    names: list[str | None] = ["default", "b", None, "default"]
    assert len(names) == ROWS
    alone = []
    for row, name in enumerate(names):
        if name is None:
            with tuned.disabled():
                alone.append(case.answers(model)[row])
        else:
            alone.append(case.answers(tuned.activate(name).model)[row])
    together = case.answers(tuned.activate(per_row=names).model)
    close(together, torch.stack(alone))
    _, found = gradients(case, model, tuned)
    assert len(found) == len(tuned.parameters("default")) + len(tuned.parameters("b"))
    assert any(g.abs().max() > 0 for g in found)


@law
def weighted(case: Case) -> None:
    """{a: .3, b: .7} is base + .3 Δa + .7 Δb on weights; for prompts, the weighted sum of the learned tables."""
    model = case.base()
    tuned = case.tuned("a", model)
    only = case.answers(model)
    case.tuned("b", model)
    close(case.answers(tuned.activate({"a": 1.0, "b": 0.0}).model), only)
    both = case.answers(tuned.activate({"a": 0.3, "b": 0.7}).model)
    if case.method.foldable:
        _weighted_weights(case, tuned, both)
    elif all(_is_table(part) for part in tuned.adapters["a"].parts):
        _weighted_tables(case, tuned, both)
    with torch.no_grad():  # the same adapter twice, in parts that add up to one, is that adapter
        for (_, p), (_, q) in zip(tuned.named_parameters("a"), tuned.named_parameters("b")):
            q.copy_(p)
    close(case.answers(tuned.activate({"a": 0.3, "b": 0.7}).model), only)


def _weighted_weights(case: Case, tuned: Tuned, both: Tensor) -> None:
    model = tuned.model
    base = {n: p.detach().clone() for n, p in base_tensors(model).items()}
    merged: dict[str, dict[str, Tensor]] = {}
    for name, active in (("a", "a"), ("b", "b"), ("both", {"a": 0.3, "b": 0.7})):
        tuned.activate(active).merge()
        merged[name] = {n: p.detach().clone() for n, p in base_tensors(model).items()}
        if name == "both":
            close(case.answers(model), both)
        tuned.unmerge()
    for name in merged["both"]:
        zero = base.get(name, torch.zeros(()))
        expected = zero + 0.3 * (merged["a"][name] - zero) + 0.7 * (merged["b"][name] - zero)
        close(merged["both"][name], expected)


def _is_table(part: Part) -> bool:
    """Whether what a prompt learns is its table of tokens, or of keys and values, and nothing else."""
    method, p, kind = cast(Any, part.method), part.tensors(), part.site.kind
    if kind not in ("model", "attention") or part.shared_keys or method.stands_beside:
        return False
    made = (method.tokens(p, part.site),) if kind == "model" else method.keys_values(p, part.site)
    return {id(t) for t in made} == {id(t) for t in p.values()}


def _weighted_tables(case: Case, tuned: Tuned, both: Tensor) -> None:
    """An adapter that holds .3 a + .7 b answers the same, where tables are the trained tensors themselves."""
    case.attach(tuned.model, "c")
    with torch.no_grad():
        for (_, a), (_, b), (_, c) in zip(*(tuned.named_parameters(name) for name in "abc")):
            c.copy_(0.3 * a + 0.7 * b)
    close(case.answers(tuned.activate("c").model), both)
    tuned.remove("c")


@law
def disable(case: Case) -> None:
    """Disabled, the model is the base: outputs equal bit for bit, and the adapter is back afterwards."""
    plain = case.answers(case.base())
    tuned = case.tuned()
    adapted = case.answers(tuned.model)
    with tuned.disabled() as model:
        assert torch.equal(case.answers(model), plain)
    assert torch.equal(case.answers(tuned.model), adapted)
    differ(adapted, plain)
    assert torch.equal(case.answers(tuned.detach()), plain)


@law
def deepcopy(case: Case) -> None:
    """A deep copy answers the same and is independent."""
    tuned = case.tuned()
    before = case.answers(tuned.model)
    twin = veneer.of(copy.deepcopy(tuned.model))
    assert twin is not tuned and torch.equal(case.answers(twin.model), before)
    stir(twin, "default", case.seed + 1)
    differ(case.answers(twin.model), before)
    assert torch.equal(case.answers(tuned.model), before)
    with twin.disabled():
        assert torch.equal(case.answers(tuned.model), before)


# -- how it is run --------------------------------------------------------------------------------------------


@law
def compile(case: Case) -> None:
    """torch.compile(fullgraph=True) in training mode: same loss, same gradients."""
    torch._dynamo.reset()
    tuned = case.tuned(model=case.base(depth=1))
    model, batch = tuned.model, case.batch()
    value, expected = gradients(case, model, tuned)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    again = loss(compiled, batch)  # type: ignore[arg-type]
    found = torch.autograd.grad(again, tuned.parameters(), allow_unused=True)
    close(again, value)
    for g, e in zip(found, expected):
        close(torch.zeros_like(e) if g is None else g, e, GRADIENT)


@law
def ckpt(case: Case) -> None:
    """Gradient checkpointing (use_reentrant=False): same loss, same gradients."""
    tuned = case.tuned()
    with counted(tuned.model) as plain:
        value, expected = gradients(case, tuned.model, tuned)
    with checkpointed(tuned.model) as runs:
        again, found = gradients(case, tuned.model, tuned)
    if any(s.role != "head" for s in tuned.sites()):
        assert len(runs) == len(plain) + 1, f"the first block ran {len(runs)} times instead of {len(plain)} and once more"
    close(again, value)
    for g, e in zip(found, expected):
        close(g, e, GRADIENT)


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[list[None]]:
    """Yields a list that gets an entry for every run of a layer in the first block."""
    block = next(model.get_submodule(s.module) for s in anatomy.sites(model) if s.kind == "block")
    runs: list[None] = []
    layer = next(m for m in block.modules() if type(m).__name__.endswith("Norm"))
    hook = layer.register_forward_pre_hook(lambda *_: runs.append(None))
    yield runs
    hook.remove()


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[list[None]]:
    """The model's own gradient checkpointing; for plain models, checkpoints around every block. Yields as `counted`."""
    with counted(model) as runs:
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        else:
            for block in (model.get_submodule(s.module) for s in anatomy.sites(model) if s.kind == "block"):
                block.__dict__["forward"] = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
        yield runs


@law
def bf16(case: Case) -> None:
    """Over a bfloat16 base the adapter is float32 and one step lowers the loss."""

    def start() -> Tuned:
        tuned = case.attach(case.base(torch.bfloat16), seed=case.seed)
        assert {p.dtype for p in tuned.parameters()} == {torch.float32}
        return tuned

    one_step_helps(case, start)
    tuned = case.tuned(model=case.base(torch.bfloat16))
    assert case.answers(tuned.model).dtype == case.answers(case.base(torch.bfloat16)).dtype


@law
def bnb4(case: Case) -> None:
    """Over a base of 4-bit layers: identity kept, gradients arrive, one step lowers the loss; also after an evaluation first."""
    if "identity" not in case.method.limits:
        model = four_bit(case)
        before = case.answers(model.train())  # in evaluation the base may round to bfloat16
        case.attach(model, seed=case.seed)
        close(case.answers(model.eval()), before, 1e-5)

    def evaluated() -> Tuned:
        tuned = case.attach(four_bit(case), seed=case.seed)
        case.answers(tuned.model.eval())
        return tuned

    one_step_helps(case, evaluated)
    model = four_bit(case)
    case.answers(model)  # an evaluation before anything is attached repacks weights on some CPUs
    tuned = case.tuned(model=model, size=0.05)
    _, found = _gradients32(case, tuned)
    assert all(torch.isfinite(g).all() for g in found) and any(g.abs().max() > 0 for g in found)
    model = four_bit(case)
    again = case.tuned(model=model, size=0.05)
    expected = torch.cat([e.flatten() for e in _gradients32(case, again)[1]])
    off = float((torch.cat([g.flatten() for g in found]) - expected).norm())
    # the repacked scales were rounded to bfloat16: all gradients together, as a router may choose otherwise or a kink lie
    # between the two; without any gradient the quotient is 1
    assert off <= 0.5 * float(expected.norm()) + 1e-4, f"gradients differ by {off:.2g} after an evaluation of the base"


def _gradients32(case: Case, tuned: Tuned) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = loss(tuned.model.train(), case.batch(torch.float32))
    found = torch.autograd.grad(value, tuned.parameters(), allow_unused=True)
    return value, tuple(torch.zeros_like(p) if g is None else g for g, p in zip(found, tuned.parameters()))


def four_bit(case: Case) -> nn.Module:
    """The case's model with every linear layer in its blocks stored in nf4; wide enough for blocks of 64 numbers."""
    import bitsandbytes as bnb

    model = case.subject.build(torch.float32, width=64)
    count = 0
    for site in anatomy.sites(model):
        module = model.get_submodule(site.module)
        if site.kind != "linear" or site.depth is None or type(module) is not nn.Linear:
            continue
        packed = bnb.nn.Linear4bit(
            module.in_features, module.out_features, module.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
        )
        packed.weight = bnb.nn.Params4bit(module.weight.data.clone(), requires_grad=False, quant_type="nf4")
        if module.bias is not None:
            packed.bias = nn.Parameter(module.bias.data.clone())
        parent, _, name = site.module.rpartition(".")
        setattr(model.get_submodule(parent), name, packed.to("cpu"))
        count += 1
    assert count, "no layer was quantised"
    return model.train(model.training)


# -- numbers and words ----------------------------------------------------------------------------------------


@law
def count(case: Case) -> None:
    """The number of trained parameters is that of the shapes `init` gives, and the card's formula."""
    tuned = case.attach(case.base())
    summary = tuned.summary()
    assert summary.trained == sum(p.numel() for p in tuned.parameters())
    assert summary.sites == len(tuned.sites())
    assert summary.total == sum(p.numel() for p in case.base().parameters()) + summary.trained
    kept = {f"{part.site.name}/{k}": t for part in tuned.adapters["default"].parts for k, t in part.tensors().items()}
    for part in tuned.adapters["default"].parts:
        made = part.method.init(part.site, torch.Generator().manual_seed(0))
        for key in part.keys:
            if key in made:
                assert kept[f"{part.site.name}/{key}"].shape == made[key].shape, f"{part.site.name}/{key} has another shape than init gave"
    if case.slug in FORMULAS:
        expected = FORMULAS[case.slug](case.method, tuned.sites())
        assert summary.trained == expected, f"{summary.trained} trained parameters, the card's formula gives {expected}"


@law
def refuses(case: Case) -> None:
    """Every hyper-parameter out of its range gives one sentence that names method, option and range; unknown ones the nearest."""
    card = case.card
    for option in card.options:
        for bad in _out_of_range(option.limits):
            try:
                veneer.method(case.slug, **{option.name: bad})
            except BadValue as error:
                text = str(error)
                legal = [repr(choice) for choice in option.limits.get("choices", ())] or [option.legal]
                assert all(word in text for word in (card.class_name, option.name, *legal)), text
                assert len(text) < 300 and "\n" not in text
            else:
                raise AssertionError(f"{option.name}={bad!r} was accepted; legal is {option.legal}")
        misspelt = option.name + option.name[-1]
        try:
            veneer.method(case.slug, **{misspelt: option.default})
        except UnknownName as error:
            assert repr(option.name) in str(error) and card.class_name in str(error), str(error)
        else:
            raise AssertionError(f"the option {misspelt!r} was accepted")


def _out_of_range(limits: Any) -> Iterator[Any]:
    if "choices" in limits:
        yield "no-such-choice"
    if "ge" in limits:
        yield limits["ge"] - 1
    if "gt" in limits:
        yield limits["gt"]
    if "le" in limits:
        yield limits["le"] + 1
    if "lt" in limits:
        yield limits["lt"]


# -- kinds of layers and families -----------------------------------------------------------------------------

ON_LAYERS = ("identity", "step", "gradients", "definition", "save", "merge", "unmerge", "two", "rows", "disable", "weighted")
"""Laws that must hold on every kind of layer."""
OF_WEIGHTS = (
    "identity", "step", "gradients", "definition", "save", "merge", "unmerge", "two", "rows", "weighted", "compile", "ckpt", "bf16",
    "count",
)  # fmt: skip
"""Laws to hold under other hyper-parameters of methods that change weights."""

ON_FAMILIES = ("identity", "step", "gradients", "save", "merge", "unmerge", "rows")
"""Laws that must hold with a method's own targets on every family of models."""


def all_laws(case: Case, names: Sequence[str]) -> None:
    """Some laws on another model or other targets."""
    for name in names:
        if declared(case, name) is None:
            try:
                LAWS[name](case)
            except Exception as error:
                error.add_note(f"in the law {name!r}, {case.method} on {case.subject.name}")
                raise


def on_layer(kind: str) -> Law:
    def holds(case: Case) -> None:
        layer = LAYER_KINDS[kind]
        for targets in layer.targets_for(case.slug):
            there = Case(case.slug, case.seed, SUBJECTS[layer.subject], targets)
            all_laws(there, ON_LAYERS)
            plain, tuned = there.answers(there.base()), there.attach(there.base())
            descend(there, tuned, steps=4)
            differ(there.answers(tuned.model.eval()), plain, 1e-8)

    holds.__doc__ = f"Attaches to {kind} layers and keeps all laws there."
    return holds


def on_family(name: str) -> Law:
    def holds(case: Case) -> None:
        all_laws(Case(case.slug, case.seed, SUBJECTS[name]), ON_FAMILIES)

    holds.__doc__ = f"Its own targets on a {name} model."
    return holds


FAMILIES = ("bert", "vit")
LAWS["gradients"] = LAWS.pop("gradients_law")
LAWS = {
    **{kind: on_layer(kind) for kind in LAYER_KINDS},
    **{name: LAWS[name] for name in ("identity", "step", "gradients", "definition")},
    **LAWS,
    **{name: on_family(name) for name in FAMILIES},
}
FEATURES = tuple(LAWS)


PLACES = {
    "model": "the model's input tokens",
    "attention": "attention's keys and values",
    "block": "the tokens between blocks",
    "branch": "whole sub-layers",
    "norm": "norms",
    "linear": "linear layers",
    "conv": "convolutions",
}


def declared(case: Case, feature: str) -> str | None:
    """Why this cell cannot hold, as the method says it or as its kinds of sites do; None when it must hold."""
    limits = case.method.limits
    if feature in limits and feature != "gradients":
        return limits[feature]
    if feature in ("merge", "unmerge", "definition") and "merge" in limits:
        return limits["merge"]
    if feature in LAYER_KINDS:
        kinds = case.method.kinds
        if LAYER_KINDS[feature].kind not in kinds:
            return f"it acts on {', '.join(PLACES.get(kind, kind) for kind in kinds)}, not on a layer of this kind"
        if feature == "mha" and "merge" in limits:
            return f"its projections are read as weights, and {limits['merge']}"
    return None


def refused(case: Case, feature: str, reason: str) -> None:
    """The library says no to what a method declares impossible, with the reason; an inexact start is shown to be one."""
    if feature == "identity":
        model = case.base()
        before = case.answers(model)
        case.attach(model, seed=case.seed)
        differ(case.answers(model), before)
    elif feature in ("merge", "unmerge", "definition"):
        said = refusal(lambda: case.tuned().merge())
        assert case.method.limits["merge"] in said, f"merge was refused without its reason: {said}"
    elif feature in LAYER_KINDS:
        layer = LAYER_KINDS[feature]
        for targets in layer.targets:
            method = replaced(case.method, {"targets": targets})
            refusal(lambda: veneer.attach(SUBJECTS[layer.subject].build(), method, head=False))  # noqa: B023
    else:
        said = refusal(lambda: LAWS[feature](case))
        assert reason in said, f"{feature} was refused without its reason {reason!r}: {said}"


def refusal(action: Callable[[], Any]) -> str:
    try:
        action()
    except (Unsupported, NoMatch, BadValue) as error:
        return str(error)
    raise AssertionError("this is declared impossible, but the library did not refuse it")
