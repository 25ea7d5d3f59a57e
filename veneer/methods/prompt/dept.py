"""DePT: a short learned prompt, and a low-rank shift of the text's own embeddings by position (2023, arXiv:2309.05173)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Generator, Tensor

from veneer.errors import BadValue
from veneer.init import kaiming_uniform, zeros
from veneer.method import Params
from veneer.methods.prompt.prompt_tuning import PromptTuning
from veneer.option import option
from veneer.site import Site


@dataclass(frozen=True)
class DePT(PromptTuning):
    """X′ = [P ; E + c · A B] on the token embeddings E, c = alpha / √r; row i of A B goes to the i-th token of the text

    Pick it in place of prompt tuning where sequences must stay short: length · D + r · (s + D) numbers equal a prompt of l
    tokens when they sum to l · D, as (40, 45) or (60, 30) and l = 100 do for D = 768, s = 256. Not for texts of more than s tokens.

    Tensors: P [length, D], starts as in `prompt-tuning` ("normal": N(0, 1)); A [s, r], Kaiming-uniform(√5); B [r, D], zeros:
    the shift starts at zero, and with length=0 the whole as the base. r=0 is prompt tuning. Rows follow each text's
    first token, also behind padding on the left; generated tokens get no shift; in encoder-decoders the encoder has it.

    Args:
        lr_ratio: the released T5 runs train P at 0.3 to 0.4, A and B at 1e-4 to 5e-3.
    """

    length: int = option(40, "number of learned tokens", ge=0)
    start: str = option("vocabulary", "where P starts", choices=("vocabulary", "uniform", "normal", "text", "labels"))
    r: int = option(45, "rank of the shift", ge=0)
    s: int = option(256, "longest text in tokens", ge=1)
    alpha: float = option(8.0, "scale numerator of the shift", gt=0)
    lr_ratio: float = option(100.0, "learning rate of P over that of A and B", gt=0)

    default_lr = 1e-3
    sizes = ("length", "r")  # type: ignore[assignment]
    aliases = {"m": "length", "Pn": "length", "num_virtual_tokens": "length", "prefix_length": "length", "init": "start"}

    @property
    def limits(self) -> dict[str, str]:  # type: ignore[override]
        base = PromptTuning.limits
        return dict(base) if self.length else {"merge": base["merge"]}

    def validate(self) -> None:
        super().validate()
        if not self.length and not self.r:
            raise BadValue("DePT: length=0 and r=0 leave nothing to train; give one of them.")

    def init(self, site: Site, generator: Generator) -> Params:
        D, P = site.in_features, {}
        if self.length:
            normal = self.start == "normal"
            P = {"P": zeros((self.length, D)).normal_(generator=generator)} if normal else super().init(site, generator)
        return {**P, "A": kaiming_uniform((self.s, self.r), generator), "B": zeros((self.r, D))} if self.r else P

    def init_from_weight(self, W: Tensor, b: Tensor | None, p: Params, site: Site, generator: Generator) -> Params:
        if not self.length or self.start == "normal":
            return p
        return {**p, "P": super().init_from_weight(W, b, p, site, generator)["P"]}

    def tokens(self, p: Params, site: Site) -> Tensor:
        return p["P"] if self.length else p["B"].new_zeros(0, site.in_features)

    def text_shift(self, p: Params, site: Site, length: int) -> Tensor | None:
        if not self.r:
            return None
        if length > self.s:
            raise BadValue(f"DePT: the text has {length} tokens and s={self.s} rows of A; choose s of at least {length} or shorter texts.")
        return self.alpha / self.r**0.5 * p["A"][:length] @ p["B"]

    def lr_ratios(self) -> Mapping[str, float]:
        return {"P": self.lr_ratio}
