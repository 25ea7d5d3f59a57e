"""The contract: what a method says about itself, and what it is given. No method is named here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import torch
from torch import Generator, Tensor

from veneer.callable import make_callable
from veneer.errors import BadValue, Unsupported
from veneer.kernels.dispatch import fused
from veneer.kernels.eager import eager
from veneer.kernels.low_rank import inner_products
from veneer.kernels.recomputed import recomputed
from veneer.option import check
from veneer.site import Site, choose

if TYPE_CHECKING:
    from veneer.part import Part
    from veneer.seam import Change
    from veneer.strategy import Strategy

Params: TypeAlias = dict[str, Tensor]
"""A site's tensors and the shared ones, under the names in the method's docstring."""

make_callable(__name__)

KEEP: Any = object()
"""Stands for "the layer's own" where None is a value."""

WEIGHTS = ("linear", "conv", "embedding", "parameter")
"""Kinds of sites that carry a weight matrix, [out, in] (`parameter`: also a stack of them)."""


class Call:
    """The layer below: the frozen layer, a quantised one, or what another method made of it.

    A method that only calls it runs on every layer, 4-bit ones included, without dequantising.
    """

    training: bool
    caller: Part | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The layer's output for the input x [..., in] → [..., out]."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The weight [out, in], dequantised; without gradient to the base."""
        raise NotImplementedError

    def bias(self) -> Tensor | None:
        """The bias [out] or None."""
        raise NotImplementedError

    def apply(self, x: Tensor, weight: Any = KEEP, bias: Any = KEEP) -> Tensor:
        """The layer's operation with another weight [out, in] or bias [out] in place of its own."""
        raise NotImplementedError

    def add_low_rank(self, x: Tensor, L: Tensor, R: Tensor, inner: Tensor | None = None) -> Tensor:
        """call(x) + (inner Rᵀ) Lᵀ without forming L R; L [out, r], R [r, in]; inner is x unless given (dropout).

        A factor that needs no gradient costs nothing to keep: x is saved only for R's, inner Rᵀ only for L's."""
        raise NotImplementedError

    def gain_low_rank(self, x: Tensor, L: Tensor, R: Tensor, gain: Tensor) -> Tensor:
        """`add_low_rank` of a linear layer with everything but the bias multiplied by gain [out]."""
        y, b = self.add_low_rank(x, L, R), self.bias()
        return gain * y if b is None else gain * y + b * (1 - gain)

    def matrix(self, x: Tensor) -> Tensor | None:
        """The frozen weight [out, in], where calling it is x Wᵀ + b with it as it stands: for fused functions. Else None."""
        return None

    def inner(self, x: Tensor, R: Tensor) -> Tensor:
        """R xᵀ [r, N] of a linear layer, N rows of x; taken together with the layers that read the same x, where there are any."""
        if eager(x):
            return inner_products(x, [R])[0]
        return torch.nn.functional.linear(x, R.to(x.dtype)).reshape(-1, len(R)).t()

    def plus(self, x: Tensor, change: Tensor, fresh: bool = False) -> Tensor:
        """call(x) + change, for a change [..., out] or its rows [N, out].

        A fresh one may be overwritten: nothing else holds it, and no gradient needs its values."""
        y = self(x)
        return y + change.reshape(y.shape)

    def between(self, x: Tensor, change: Change | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A block's output for x [B, T, D] where h, its stream behind attention, becomes that of fewer tokens before the feed-forward.

        change(h, keys) gives them, [B, T′, D], and the new row of every old one, [B, T], which is handed back; keys [B, T,
        head_dim] are the heads' mean. bias [B, T] is added to every score of a key. For methods whose `splits_blocks` holds."""
        seam = None if self.caller is None else self.caller.seam
        if seam is None:
            raise Unsupported("only a block of a method whose `splits_blocks` holds can be entered between its sub-layers.")
        return seam.run(self, x, change, bias)

    def rebuild(self, x: Tensor, build: Callable[[Tensor, Params], Tensor], p: Params) -> Tensor:
        """The layer's operation with the weight build(W, p) [out, in], which backward builds again instead of keeping it.

        `build` must give the same weight both times: no dropout in it."""
        return self.apply(x, weight=build(self.weight(), p))

    def others(self, x: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """This layer's output for x with each of these adapters in the caller's place, by name; those that do not act here are
        left out. For methods whose `mixes` holds."""
        if self.caller is None or self.caller.others is None:
            raise Unsupported("only a method whose `mixes` holds is shown what other adapters make of a layer.")
        return self.caller.others(self, x, names)

    def note(self, key: str, value: Tensor) -> None:
        """Leaves a tensor of this forward pass for the method's strategy (`Tuned.notes`); the next pass replaces it."""
        if self.caller is not None and self.training:
            self.caller.notes[key] = value


@dataclass(frozen=True)
class Method:
    """Hyper-parameters and maths of one method. Immutable, owns no tensors, knows no model.

    Args:
        targets: where it acts: roles ("attn.q attn.v"), module names or regular expressions over them;
            None means the method's own choice, `default_targets`.
        leave_out: depths of blocks that are left alone.
    """

    targets: str | None = dataclasses.field(default=None, kw_only=True, metadata={"help": "roles or module names it acts on"})
    leave_out: tuple[int, ...] = dataclasses.field(default=(), kw_only=True, metadata={"help": "block depths left alone"})

    default_targets: ClassVar[str] = "attn.q attn.v"
    kinds: ClassVar[tuple[str, ...]] = WEIGHTS
    """Kinds of sites it can act on."""
    frozen: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that are stored but not trained."""
    fixed: ClassVar[tuple[str, ...]] = ()
    """Names of tensors that are not trained and that `init` or `init_shared` give again from hyper-parameters (a `seed`)
    and shapes alone, whatever generator they are handed: files leave them out and keep a checksum."""
    sizes: ClassVar[tuple[str, ...]] = ("r",)
    """Hyper-parameters that set the number of trained parameters; the first is the one to vary for a budget."""
    weighs: ClassVar[bool] = False
    """True if the shapes of its tensors depend on the frozen weight, so that counting needs the weights themselves."""
    limits: ClassVar[Mapping[str, str]] = {}
    """Features that the method's nature forbids, each with the reason: {"merge": "the bottleneck is nonlinear"}.
    Keys are the columns of the feature table; `conformance` reads them, and the library refuses with the reason."""
    aliases: ClassVar[Mapping[str, str]] = {}
    """Other names of hyper-parameters, as a paper or a peer spells them."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.slug = cls.__module__.rsplit(".", 1)[-1].replace("_", "-")

    slug: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            limits = {k: v for k, v in f.metadata.items() if k != "help"}
            check(self.label, f.name, getattr(self, f.name), f.default, limits, str(f.type))
        self.validate()

    # -- what a method may say ------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raises `BadValue` for hyper-parameters that do not go together. Ranges of single ones stand in `option`."""

    def check(self, site: Site) -> None:
        """Raises `BadValue` (with `self.refuse`) if the hyper-parameters do not fit this site's shape."""

    def check_tensors(self, p: Params, site: Site) -> None:
        """Raises `BadValue` for tensors of a file that must not be used as they are: positions outside the weight, say.

        Of stacked matrices it is asked one by one."""

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """The sites it acts on, in model order; by default those that `targets` names."""
        chosen = choose(sites, self.targets or self.default_targets, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        return [s for s in chosen if s.depth is None or s.depth not in self.leave_out]

    def views(self, sites: Sequence[Site]) -> list[Site]:
        """Sites the method makes of the model's own, under names of their own (a branch that begins elsewhere): `select` may
        give them, and files name them."""
        return []

    def tie(self, site: Site) -> str | None:
        """Name of the group of sites that share this site's `init_shared` tensors; one group ("all") by default."""
        return "all"

    def init(self, site: Site, generator: Generator) -> Params:
        """Tensors of one site."""
        return {}

    def init_shared(self, sites: Sequence[Site], generator: Generator) -> Params:
        """Tensors shared by all sites of one tie group, stored once."""
        return {}

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        """The site's tensors once the frozen weight is known (norms, decompositions, copies). Override only if needed:
        the frame reads (and dequantises) weights at attach only for methods that do, and whose `reads_weight` holds."""
        return p

    @property
    def reads_weight(self) -> bool:
        """Whether these hyper-parameters need `init_from_weight`."""
        return type(self).init_from_weight is not Method.init_from_weight

    trains_heads: ClassVar[bool] = False
    """True for the one method that trains a model's own task head beside any other method."""

    widens: ClassVar[bool] = False
    """True if `turn` or `activation` computes in the tensors' dtype by itself where a fused kernel runs: h then comes in its own."""

    last_counts: ClassVar[bool] = False
    """True if a run keeps the state of its last step, not of the best one measured on the way."""

    splits_blocks: ClassVar[bool] = False
    """True for a method of blocks that changes the number of tokens inside them: it uses `call.between`, alone in its stack."""

    proportional = False  # not annotated: a method's own option may have the name
    """Whether such a method weighs keys, which the model's attention must then allow."""

    mixes: ClassVar[bool] = False
    """True for a method that answers from other adapters' outputs, `call.others`: it is asked `among` in place of `select`."""

    @property
    def relies_on(self) -> tuple[str, ...]:
        """Names of the adapters that must be attached for as long as this one is."""
        return ()

    def among(self, adapters: Mapping[str, Sequence[Site]]) -> tuple[Method, list[Site]]:
        """For a method that mixes: itself with the names of those it will mix, and its sites, from the adapters attached and theirs."""
        raise NotImplementedError

    prunes: ClassVar[bool] = False
    """True for a method that trains what `veneer.slim` prunes by, at the end of a stack."""

    default_lr: ClassVar[float] = 1e-3
    """Learning rate for AdamW when the user gives none."""

    calibrates = False
    """True (also as a property of the hyper-parameters) if the start needs inputs from data: `observe` and `settle`."""

    def observe(self, state: Any, x: Tensor, site: Site) -> Any:
        """Takes one batch of this site's inputs x [..., in] at the start; returns the new state (None at first)."""
        raise NotImplementedError

    reads_gradients = False
    """True (also as a property) if the start needs gradients of the base's own weights on data: `observe_gradient` and `settle`."""

    batches_wanted = 8
    """How many batches a loop of ours hands to a method that starts from data."""

    def observe_gradient(self, state: Any, name: str, grad: Tensor, site: Site) -> Any:
        """Takes one batch's gradient of the site's "weight" [out, in] (norms [d]) or "bias" [out]; returns the new state."""
        raise NotImplementedError

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        """From the states by site name: the method and first tensors of every site, or None to leave the site out."""
        raise NotImplementedError

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        """The adapted output, given the layer below as `call`."""
        raise NotImplementedError

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] (norms: gain [d]) and bias that make the frozen layer alone give the adapted output."""
        reason = self.limits.get("merge", "it does not act on a weight")
        raise Unsupported(f"{self.label} cannot be folded into a weight: {reason}.")

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        """The weight [out, in] that makes a bare layer do what the method does; for tests and for people."""
        return self.fold(W, None, p, site or Site.bare(W))[0]

    def strategy(self) -> Strategy | None:
        """What has to happen around training steps, if anything."""
        return None

    def lr_ratios(self) -> Mapping[str, float]:
        """Tensor name → factor on the learning rate, where it is not 1."""
        return {}

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        """L [out, r] and R [r, in] with L R exactly the change of the weight W; None where it is not of low rank."""
        return None

    def adds(self, site: Site) -> bool:
        """Whether its output is call(x) + delta(x, p, site), whatever the layer below is: rows of one batch then share call(x)."""
        return False

    # -- what every method can do ---------------------------------------------------------------------------

    @property
    def label(self) -> str:
        """The method's name in messages: its class."""
        return type(self).__name__

    @property
    def foldable(self) -> bool:
        """Whether the change can be written into the frozen layer."""
        return "merge" not in self.limits and type(self).fold is not Method.fold

    def refuse(self, what: str, site: Site) -> BadValue:
        """A `BadValue` that names method, value and place: `raise self.refuse("r=512 is …; choose …", site)`."""
        return BadValue(
            f"{self.label}: {what.replace('{at}', f'at {site.name}')}" if "{at}" in what else f"{self.label}: {what} (at {site.name})"
        )

    @property
    def parts(self) -> tuple[Method, ...]:
        return (self,)

    def __add__(self, other: Method) -> Stack:
        return Stack(methods=(*self.parts, *other.parts))

    @property
    def spec(self) -> str:
        """The method as `veneer.parse` reads it: slug and the hyper-parameters that differ from the defaults."""
        shown = []
        for f in sorted(dataclasses.fields(self), key=lambda f: f.kw_only is True):
            value = getattr(self, f.name)
            if value != f.default:
                shown.append(f"{f.name}={value!r}")
        return f"{self.slug}({', '.join(shown)})" if shown else self.slug

    def __str__(self) -> str:
        return self.spec


@dataclass(frozen=True)
class WeightMethod(Method):
    """W_eff = f(W; p). Give `weight`; forward, merge and all layer kinds follow.

    The forward builds f(W; p) anew in backward, so that nothing of the weight's size is kept between the two.
    """

    recomputes: ClassVar[bool] = False
    """True (also as a property) if `delta` or `turn` is to run again in backward instead of keeping what lies inside:
    where it is cheap and keeps several tensors of the input's size. It must not draw random numbers then."""

    def again(self, run: Callable[[Tensor, Params], Tensor], x: Tensor, p: Params) -> Tensor:
        """run(x, p), as `recomputes` says."""
        return recomputed(x, run, p) if self.recomputes else run(x, p)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        """The definition, dense: [out, in] → [out, in]."""
        raise NotImplementedError

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        return call.rebuild(x, lambda W, p: self.weight(W, p, site), p)

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return self.weight(W, p, site), b


@dataclass(frozen=True)
class AdditiveMethod(WeightMethod):
    """W_eff = W + ΔW(p). Give `change`, and `delta` where x ΔWᵀ does not need the dense ΔW."""

    dropout = 0.0  # not annotated: a method's own field of this name must keep its place among the arguments

    def change(self, p: Params, site: Site) -> Tensor:
        """ΔW [out, in], dense; scales are already in it."""
        raise NotImplementedError

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """x ΔWᵀ for a linear layer, [..., in] → [..., out]. Cast what multiplies x to x's dtype."""
        raise NotImplementedError

    def adds(self, site: Site) -> bool:
        plain = type(self).forward in (AdditiveMethod.forward, LowRankMethod.forward)
        return plain and site.kind == "linear" and not self.dropout and type(self).delta is not AdditiveMethod.delta

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return W + self.change(p, site or Site.bare(W)).reshape(W.shape)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        drops = bool(self.dropout) and call.training and x.is_floating_point()
        if site.kind == "linear" and type(self).delta is not AdditiveMethod.delta:
            inner = torch.nn.functional.dropout(x, self.dropout) if drops else x
            return call.plus(x, self.again(lambda x, p: self.delta(x, p, site), inner, p))
        if drops:
            return call(x) + call.apply(torch.nn.functional.dropout(x, self.dropout), weight=self.change(p, site), bias=None)
        return super().forward(call, x, p, site)


@dataclass(frozen=True)
class LowRankMethod(AdditiveMethod):
    """W_eff = W + L R. Give `factors`; the fused forward and backward never form L R."""

    def factors(self, p: Params, site: Site | None = None) -> tuple[Tensor, Tensor]:
        """L [out, r] and R [r, in]; scales are already in them."""
        raise NotImplementedError

    def change(self, p: Params, site: Site) -> Tensor:
        L, R = self.factors(p, site)
        return L.flatten(1) @ R.flatten(1)

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        L, R = self.factors(p, site or Site.bare(W))
        return torch.addmm(W.flatten(1), L.flatten(1), R.flatten(1)).reshape(W.shape)  # one pass over the weight

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        L, R = self.factors(p, site)
        return torch.nn.functional.linear(torch.nn.functional.linear(x, R.to(x.dtype)), L.to(x.dtype))

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return self.factors(p, site)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind == "linear" and type(self).delta is not LowRankMethod.delta:
            return super().forward(call, x, p, site)
        L, R = self.factors(p, site)
        if self.dropout and call.training and x.is_floating_point():
            return call.add_low_rank(x, L, R, torch.nn.functional.dropout(x, self.dropout))
        return call.add_low_rank(x, L, R)


@dataclass(frozen=True)
class InputMethod(WeightMethod):
    """W_eff = W Mᵀ: a linear layer reads x M in place of x. Give `turn`; the frozen layer runs as it is, packed or not."""

    def turn(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """x M, linear in x, [..., in] → [..., in] in x's dtype.

        Where M is near the identity give x plus a small term: in half precision 1 + a small step is 1."""
        raise NotImplementedError

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        flat = W.flatten(1)
        M = self.turn(torch.eye(flat.shape[1]).to(flat), p, site or Site.bare(W))
        return (flat @ M.T).reshape(W.shape)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if site.kind != "linear":
            return super().forward(call, x, p, site)
        return call(self.again(lambda x, p: self.turn(x, p, site), x, p))


@dataclass(frozen=True)
class OutputMethod(WeightMethod):
    """W_eff = Qᵀ W: the layer's output without its bias, h, becomes h Q. Give `turn`; the bias is turned too if `turns_bias`."""

    turns_bias: ClassVar[bool] = False

    def turn(self, h: Tensor, p: Params, site: Site) -> Tensor:
        """h Q, linear in h, [..., out] → [..., out]; h comes in the tensors' dtype."""
        raise NotImplementedError

    def weight(self, W: Tensor, p: Params, site: Site | None = None) -> Tensor:
        return self.turn(W.flatten(1).T, p, site or Site.bare(W)).T.reshape(W.shape)

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return self.weight(W, p, site), self.turn(b, p, site) if self.turns_bias and b is not None else b

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        b = None if self.turns_bias else call.bias()
        h = call(x) if b is None else call.apply(x, bias=None)
        h = widened(h, p, self.widens)  # a turn by a small angle must not round to none
        if site.kind == "conv":  # channels are axis 1 there
            y = self.again(lambda h, p: self.turn(h, p, site), h.movedim(1, -1), p).movedim(-1, 1)
            return y if b is None else y + b.reshape(-1, *(1,) * len(site.kernel))
        y = self.again(lambda h, p: self.turn(h, p, site), h, p)
        return y if b is None else y + b


@dataclass(frozen=True)
class ActivationMethod(Method):
    """h → h′ on a layer's output (channels last). Give `activation`, and `fold` where the layer before it can absorb it."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "norm", "embedding")

    def activation(self, h: Tensor, p: Params, site: Site) -> Tensor:
        """The changed output, [..., out] → [..., out]; h comes in the tensors' dtype."""
        raise NotImplementedError

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        h = call(x)
        h = widened(h, p, self.widens)  # 1 + a small step must not round to 1
        if site.kind == "conv" or site.channels_first:  # channels are axis 1 there
            return self.activation(h.movedim(1, -1), p, site).movedim(-1, 1)
        return self.activation(h, p, site)


@dataclass(frozen=True)
class PromptMethod(Method):
    """Learned tokens at the input (`kind` model) or learned keys and values at attention (`kind` attention).

    Several active prompts follow one another in order; weighted ones of equal shape add up.
    """

    kinds: ClassVar[tuple[str, ...]] = ("model",)

    def tokens(self, p: Params, site: Site) -> Tensor:
        """For the model: the learned input embeddings [P, D]."""
        raise NotImplementedError

    def keys_values(self, p: Params, site: Site) -> tuple[Tensor, Tensor]:
        """For one attention module: keys and values, each [P, kv_heads · head_dim], as they enter the product."""
        raise NotImplementedError

    def gate(self, x: Tensor, p: Params, site: Site) -> Tensor:
        """For one attention module: a factor on its keys and values for every row, [B, 1, 1], from what it reads, x [B, T, D]."""
        raise NotImplementedError

    @property
    def gates(self) -> bool:
        return type(self).gate is not PromptMethod.gate

    stands_beside: ClassVar[bool] = False
    """True for a method of attention whose tokens have a softmax of their own: `tokens` and `beside` instead of `keys_values`."""

    def beside(self, q: Tensor, keys: Tensor, values: Tensor, p: Params, site: Site) -> Tensor:
        """For one attention module: what is added to its heads' output, [B, heads, T, head_dim], from the scaled queries q of that
        shape and the keys and values [P, kv_heads, head_dim] that the module's own projections make of `tokens` [P, D]."""
        raise NotImplementedError

    def text_shift(self, p: Params, site: Site, length: int) -> Tensor | None:
        """For the model: what is added to the embeddings of the text's own tokens, [length, D] from its first token on; None: nothing.

        Tokens that are generated later, with a key-value cache, get nothing."""
        return None

    after_first = cast("bool | None", None)
    """Input prompts: insert after the first token instead of before it; None: after it in encoders (whose
    first token is pooled), before it in decoders."""
    shift_positions = cast("bool | None", None)
    """Attention prompts: start the text at position P instead of 0; None: in decoders only."""


@dataclass(frozen=True)
class SelectionMethod(Method):
    """Trains chosen parameters of the base itself, as copies: the base stays untouched. Give `fold`: W, b ← p."""

    kinds: ClassVar[tuple[str, ...]] = (*WEIGHTS, "norm")

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        W, b = self.fold(call.weight(), call.bias(), p, site)
        return call.apply(x, weight=W, bias=b)


@dataclass(frozen=True)
class StrategyMethod(Method):
    """Nothing at any site: what happens around the training steps of the methods it is added to, as in `lora(r=8) + ist`.

    Give `strategy`."""

    kinds: ClassVar[tuple[str, ...]] = ()
    sizes: ClassVar[tuple[str, ...]] = ()
    default_targets: ClassVar[str] = ""

    def select(self, sites: Sequence[Site]) -> list[Site]:
        return []

    def strategy(self) -> Strategy:
        raise NotImplementedError


@dataclass(frozen=True)
class Stack(Method):
    """Methods in order: each sees what the one before it made of the layer."""

    methods: tuple[Method, ...] = ()

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.methods

    @property
    def spec(self) -> str:
        return " + ".join(m.spec for m in self.methods)

    @property
    def label(self) -> str:
        return " + ".join(m.label for m in self.methods)


def widened(h: Tensor, p: Params, widens: bool) -> Tensor:
    """h in the dtype of a method's tensors, if that is wider; as it is for a method that widens it in a fused kernel."""
    return h if widens and fused(h) else h.to(torch.promote_types(h.dtype, next(iter(p.values())).dtype))


def replaced(method: Method, changes: Mapping[str, Any]) -> Method:
    """A copy with some hyper-parameters changed; unknown names raise `TypeError`."""
    return dataclasses.replace(method, **dict(changes))


def options_of(cls: type[Method]) -> Iterable[dataclasses.Field]:
    """The hyper-parameter fields of a method class, own ones first."""
    return sorted(dataclasses.fields(cls), key=lambda f: f.kw_only is True)
