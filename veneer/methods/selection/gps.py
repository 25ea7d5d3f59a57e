"""GPS: of every neuron the few input weights with the largest gradients are trained (2023, arXiv:2312.10136)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from veneer.errors import Unsupported
from veneer.maths.entries import Entries
from veneer.method import Method, Params, replaced
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class GPS(Entries):
    """W_eff[o, i] = W[o, i] + v for the K inputs i of every output o with the largest |Σ_batches ∂ loss / ∂W[o, i]|; b_eff = b + vb

    Pick it where the base should move as a whole, a little everywhere, and the model's shape and speed must stay: every
    neuron can adapt, of whatever layer. It asks the task, with one backward pass over each of the batches that
    attach(…, batches=[…], loss=…) is given. The head is not trained yet then: the authors take a supervised contrastive loss
    of the features, without it. Not over a packed base, nor where tasks come and go: every one has its own places.

    Tensors: v [K · out], zeros, indices [2, K · out] (row, place in columns) and columns [c], the inputs that they meet;
    with biases vb [out], zeros, and bias_indices [out], where the layer has a bias. Starts as the base. Norms stay.

    Args:
        K: of convolutions, of the in/groups · kernel inputs of an output channel.
        entries, columns, bias_entries: what was decided at one site. Files keep it; attaching decides anew.
    """

    K: int = option(1, "weights trained of every neuron", ge=1)
    biases: bool = option(True, "train the biases of the same layers too")

    kinds = ("linear", "conv")  # type: ignore[assignment]
    sizes = ("K",)
    reads_gradients = True
    batches_wanted = 16
    default_lr = 1e-3
    default_targets = (
        "attn.q attn.k attn.v attn.o attn.qkv cross.q cross.k cross.v cross.o mlp.up mlp.gate mlp.down mixer.in mixer.out conv embed.patch"
    )
    aliases = {"times_para": "K"}
    limits = {"bnb4": "starts from gradients of the base, and its weight is stored quantised"}

    def check(self, site: Site) -> None:
        if site.in_features < self.K:
            raise self.refuse(f"K={self.K} is more than the {site.in_features} inputs of a neuron {{at}}; choose fewer.", site)

    def init(self, site: Site, generator: Generator) -> Params:
        if not self.entries:
            raise Unsupported(f"{self.label}: what it trains is decided on data when it is attached; K={self.K} says how much.")
        return super().init(site, generator)

    def observe_gradient(self, state: Any, name: str, grad: Tensor, site: Site) -> Any:
        self.check(site)
        seen = {} if state is None else state
        if name == "bias":
            return seen | {name: True}
        grad = grad.reshape(site.out_features, -1).to(torch.promote_types(grad.dtype, torch.float32))
        return seen | {name: seen[name].add_(grad) if name in seen else grad.clone()}

    def settle(self, states: Mapping[str, Any], sites: Sequence[Site]) -> dict[str, tuple[Method, Params] | None]:
        found: dict[str, tuple[Method, Params] | None] = {}
        for site in sites:
            seen = states.get(site.name) or {}
            if "weight" not in seen:  # the loss does not depend on it
                found[site.name] = None
                continue
            at = self.chosen(seen["weight"], self.K, site)
            p, out = self.positions(at, site.in_features), site.out_features if self.biases and "bias" in seen else 0
            own = {"entries": len(at), "columns": len(p["columns"]), "bias_entries": out}
            found[site.name] = replaced(self, own), p | ({"bias_indices": torch.arange(out)} if out else {})
        return found

    def chosen(self, grad: Tensor, K: int, site: Site) -> Tensor:
        """Flat positions of the K largest of every row."""
        if not bool(grad.isfinite().all()):
            raise self.refuse("the gradients {at} are not finite; look at the model and the batches.", site)
        best = grad.abs().topk(K, 1).indices.cpu()
        return (best + torch.arange(len(grad))[:, None] * grad.shape[1]).flatten()
