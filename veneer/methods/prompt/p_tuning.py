"""P-tuning: learned input tokens that a small network makes of learned vectors (2021, arXiv:2103.10385)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import linear, relu

from veneer.init import kaiming_uniform, normal, uniform
from veneer.method import Params, PromptMethod
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class PTuning(PromptMethod):
    """X′ = [P ; X], P = W_3 relu(W_2 relu(W_1 E)) row by row, or with "lstm" P = W_3 relu(W_2 biLSTM(E)), each with its bias

    Pick it where prompt tuning trains unsteadily or slowly: the network ties the tokens to one another. It matters in
    training only; the same tokens could stand as a table afterwards. Not for small models or few steps. The paper's
    templates place tokens within the text; here they stand together, before it or after its first token.

    Tensors: E [length, D], N(0, 1). "mlp": W_1 [h, D], W_2 [h, h], W_3 [D, h]. "lstm": for layer l = 0 … and each direction (f, b)
    ih_lf [4h, D or 2h], hh_lf [4h, h], bi_lf, bh_lf [4h], in torch's order of gates, uniform in ±1/√h; W_2 [2h, 2h], W_3
    [D, 2h]. Biases b_1, b_2, b_3. Kaiming-uniform(√5), biases in ±1/√fan_in. No start equals the base.

    Args:
        h: None is D for "mlp" and D / 2 for "lstm", the authors' choice.
        after_first: insert after the first token; None does so in encoders, whose first token is pooled.
    """

    length: int = option(20, "number of learned tokens", ge=1)
    encoder: str = option("mlp", "the network that makes them", choices=("mlp", "lstm"))
    h: int | None = option(None, "its hidden width; None: D, or D // 2 in each direction of the lstm", ge=1)
    layers: int = option(2, "layers of the lstm", ge=1)
    after_first: bool | None = option(None, "insert after the first token; None: in encoders")

    default_lr = 1e-3
    sizes = ("h", "length")
    default_targets = "model"
    aliases = {
        "num_virtual_tokens": "length",
        "encoder_hidden_size": "h",
        "encoder_num_layers": "layers",
        "encoder_reparameterization_type": "encoder",
    }
    limits = {
        "identity": "extra tokens change attention from the start",
        "merge": "tokens are added to the input; no weight holds them",
    }

    def width(self, site: Site) -> int:
        return self.h or max(1, site.in_features // (2 if self.encoder == "lstm" else 1))

    def init(self, site: Site, generator: Generator) -> Params:
        D, h, p = site.in_features, self.width(site), {}
        p["E"] = normal((self.length, D), generator)
        sizes = {"1": (h, D), "2": (h, h), "3": (D, h)}
        if self.encoder == "lstm":
            sizes = {"2": (2 * h, 2 * h), "3": (D, 2 * h)}
            for l in range(self.layers):
                shapes = {"ih": (4 * h, 2 * h if l else D), "hh": (4 * h, h), "bi": (4 * h,), "bh": (4 * h,)}
                p |= {f"{name}_{l}{way}": uniform(shape, generator, h**-0.5) for way in "fb" for name, shape in shapes.items()}
        for n, shape in sizes.items():
            p[f"W_{n}"], p[f"b_{n}"] = kaiming_uniform(shape, generator), kaiming_uniform(shape[:1], generator, shape[1])
        return p

    def tokens(self, p: Params, site: Site) -> Tensor:
        x = p["E"]
        if self.encoder == "lstm":
            weights = [p[f"{name}_{l}{way}"] for l in range(self.layers) for way in "fb" for name in ("ih", "hh", "bi", "bh")]
            none = x.new_zeros(2 * self.layers, 1, p["hh_0f"].shape[1])
            x = torch.lstm(x[None], (none, none), weights, True, self.layers, 0.0, False, True, True)[0][0]
        else:
            x = relu(linear(x, p["W_1"], p["b_1"]))
        return linear(relu(linear(x, p["W_2"], p["b_2"])), p["W_3"], p["b_3"])
