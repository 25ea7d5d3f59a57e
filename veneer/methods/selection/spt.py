"""SPT: the entries that a task is most sensitive to, and LoRA or adapters where there are many of them (2023, arXiv:2303.08566)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Generator, Tensor
from torch.nn.functional import dropout, gelu, linear

from veneer.errors import Unsupported
from veneer.init import kaiming_uniform, zeros
from veneer.maths.sensitivity import Sensitive
from veneer.method import Call, Method, Params
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class SPT(Sensitive):
    """W_eff = W + B A where W holds many marks, else W_eff[marks] = W[marks] + v; b_eff[marks] = b[marks] + vb

    Pick it where the number of trained parameters is fixed and nobody knows the best places: it asks the task, with one
    backward pass over each of the batches that attach(…, batches=[…]) is given, in the mode the model is in. Marks go to
    the largest s = Σ_batches (∂ loss / ∂w)² of all chosen layers. A matrix with cost / alpha marks or more, cost being
    that of a module, gets the module; a vector of d (bias, gain) with d / beta or more is trained whole; a class token
    always is. While attaching, scores take a float32 number a weight. Over a packed base, load what was decided over the
    full one. Not where tasks come and go: every one has its own places.

    Tensors, of each those that were decided on: v [n], zeros, indices [2, n] (row, place in columns) and columns [c], the
    inputs that they meet; vb [n], zeros, and bias_indices [n]; A [r, in], Kaiming-uniform(√5), and B [out, r], zeros; down
    [r, out], Kaiming-uniform(√5), down_b [r], up [out, r], up_b [out], zeros: starts as the base.

    Args:
        structured_type: "adapter" adds up(GELU(down(y))) to a linear layer's output y; at attention's output projection,
            down [r, in] reads that layer's input instead.
        dropout, drop_path: of the modules; the authors' runs have 0.1 for both.
        structured, entries, columns, bias_entries: what was decided at one site. Files keep it; attaching decides anew.
    """

    r: int = option(8, "rank of LoRA, or width of an adapter", ge=1)
    structured_type: str = option("lora", "the module", choices=("lora", "adapter"))
    dropout: float = option(0.0, "dropout on the input of a module, in training", ge=0, lt=1)
    drop_path: float = option(0.0, "share of a batch's rows whose modules training leaves out", ge=0, lt=1)

    batches_wanted = 16
    sizes = ("budget",)
    default_targets = (
        "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down mixer.in mixer.out conv norm "
        "cls_token class_embedding"
    )
    aliases = {"rank": "r", "low_rank_dim": "r"}

    @property
    def limits(self) -> Mapping[str, str]:  # type: ignore[override]
        own = {"bnb4": "starts from gradients of the base, and its weight is stored quantised"}
        adapter = self.structured_type == "adapter" and (self.structured or not self.decided)
        return own | {"merge": "its adapters are nonlinear"} if adapter else own

    def cost(self, site: Site, inside: int) -> int | None:
        out = site.out_features
        if self.structured_type == "lora":
            return self.r * (out + inside)
        return self.r * (out + self.read(site)) + self.r + out if site.kind == "linear" else None

    @staticmethod
    def read(site: Site) -> int:
        """Width of what an adapter reads: the layer's output, or the input of attention's output projection."""
        return site.in_features if site.role in ("attn.o", "cross.o") else site.out_features

    def init(self, site: Site, generator: Generator) -> Params:
        if not self.decided:
            raise Unsupported(f"{self.label}: what it trains is decided on data when it is attached; budget=… says how much.")
        out, p = site.out_features, super().init(site, generator)
        if not self.structured:
            return p
        if self.structured_type == "lora":
            return p | {"A": kaiming_uniform((self.r, site.in_features), generator), "B": zeros((out, self.r))}
        down = kaiming_uniform((self.r, self.read(site)), generator)
        return p | {"down": down, "down_b": zeros((self.r,)), "up": zeros((out, self.r)), "up_b": zeros((out,))}

    def path(self, x: Tensor, call: Call, site: Site) -> Tensor:
        """x, zero in some rows of the batch."""
        if not self.drop_path or not call.training:
            return x
        one = [1] * x.ndim
        one[site.batch_dim] = x.shape[site.batch_dim]
        return x * dropout(x.new_ones(one), self.drop_path)

    def forward(self, call: Call, x: Tensor, p: Params, site: Site) -> Tensor:
        if not self.structured:
            return super().forward(call, x, p, site)
        if "A" in p:
            thins = call.training and (self.dropout or self.drop_path) and x.is_floating_point()
            inner = self.path(dropout(x, self.dropout), call, site) if thins else None
            return self.shifted(call.add_low_rank(x, p["B"], p["A"], inner), p, site)
        y = call(x)
        q = {name: t.to(y.dtype) for name, t in p.items() if t.is_floating_point()}
        read = dropout(x if site.role in ("attn.o", "cross.o") else y, self.dropout, call.training)
        change = linear(gelu(linear(read, q["down"], q["down_b"])), q["up"], q["up_b"])
        return self.shifted(y + self.path(change, call, site), p, site)

    def change(self, p: Params, site: Site) -> Tensor:
        return p["B"] @ p["A"] if "A" in p else super().change(p, site)

    def fold(self, W: Tensor, b: Tensor | None, p: Params, site: Site) -> tuple[Tensor, Tensor | None]:
        return Method.fold(self, W, b, p, site) if "up" in p else super().fold(W, b, p, site)

    def delta(self, x: Tensor, p: Params, site: Site) -> Tensor:
        return self.shifted(linear(linear(x, p["A"].to(x.dtype)), p["B"].to(x.dtype)), p, site) if "A" in p else super().delta(x, p, site)

    def low_rank(self, W: Tensor, p: Params, site: Site) -> tuple[Tensor, Tensor] | None:
        return (p["B"], p["A"]) if "A" in p else None

    def adds(self, site: Site) -> bool:
        return site.kind == "linear" and not (self.structured and (self.structured_type == "adapter" or self.dropout or self.drop_path))
