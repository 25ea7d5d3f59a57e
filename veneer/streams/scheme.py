"""What a reversible model is asked to be: the variant and its settings, checked without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from veneer.errors import UnknownName, nearest
from veneer.option import check, option
from veneer.registry import Card, Option
from veneer.spec import parse_one

VARIANTS = {"meft1": (0.1, 1.0), "meft2": (1.0, 0.1), "meft3": (0.1, 0.1)}
"""Each variant's own lambda and beta."""


@dataclass(frozen=True)
class Scheme:
    """y1 = lambda x1 + F(x2), y2 = beta x2 + G(y1), block after block; the first block's x1 = x2 is what the blocks are given.

    | variant | F | G | handed on |
    |---|---|---|---|
    | meft1 | the block | the adapter on the stream | (y2, y1) |
    | meft2 | the adapter on the stream | the block | (y2, y1) |
    | meft3 | the block's attention half | its feed-forward half | (y1, y2) |

    Args:
        lambda_, beta: written `lambda` in a spec and in files. The smaller one is, the nearer is the pretrained model and the
            larger the error of rebuilding: each block multiplies it by about 1/lambda or 1/beta.
        layers: so many blocks of each stack are reversible, the last ones; those before run as usual.
        anchors: keep the pair of streams after every so many blocks too, so that errors do not grow further.
        output: what is made of the last pair, main stream m and other o: "mean" (m + o)/2 or "sum" m + min(lambda, beta) o.
        streams: number format of the pair of streams. In float64 a rebuilt input rounds to the very numbers the block read before, so
            that it gives the same output and errors do not pass through it; one pair is all that is wider. "float32" halves that pair
            for shallow models, "own" is the model's dtype.
        tolerance: relative error of the rebuilt input above which a warning says so.
    """

    variant: str = option("meft1", "which of the three networks", choices=("meft1", "meft2", "meft3"))
    lambda_: float | None = option(None, "share of the first stream that is carried on; None: the variant's", gt=0)
    beta: float | None = option(None, "share of the second stream that is carried on; None: the variant's", gt=0)
    layers: int | None = option(None, "number of reversible blocks, the last ones of each stack; None: all", ge=1)
    anchors: int | None = option(None, "keep the streams after every so many blocks; None: only the last", ge=1)
    output: str | None = option(None, "how the streams end; None: mean for post-norm blocks, else sum", choices=("mean", "sum"))
    streams: str = option("float64", "number format of the streams", choices=("float64", "float32", "own"))
    tolerance: float = option(0.01, "relative error of a rebuilt input that is still good", gt=0)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            limits = {k: v for k, v in f.metadata.items() if k != "help"}
            check("reversible", f.name.rstrip("_"), getattr(self, f.name), f.default, limits, str(f.type))

    @property
    def shares(self) -> tuple[float, float]:
        """lambda and beta."""
        first, second = VARIANTS[self.variant]
        return first if self.lambda_ is None else self.lambda_, second if self.beta is None else self.beta

    @property
    def spec(self) -> str:
        """As `Scheme.of` reads it: the variant and what differs from the defaults."""
        fields = [f for f in dataclasses.fields(self) if f.name != "variant" and getattr(self, f.name) != f.default]
        said = ", ".join(f"{f.name.rstrip('_')}={getattr(self, f.name)!r}" for f in fields)
        return f"{self.variant}({said})" if said else self.variant

    @classmethod
    def of(cls, spec: str, options: Mapping[str, Any] | None = None) -> Scheme:
        """From "meft1", or "meft1(lambda=0.5, anchors=4)", and further options.

        Raises:
            UnknownName: no such variant or option, with the nearest. BadValue: a value out of range, or text that is no spec.
        """
        variant, given = parse_one(spec, card, "variant")
        further = dict(card(variant).check(name, value) for name, value in (options or {}).items())
        return cls(variant=variant, **{**given, **further})


def card(variant: str) -> Card:
    """The options of a variant, as those of methods are kept. Raises `UnknownName`."""
    slug = variant.lower()
    if slug not in VARIANTS:
        raise UnknownName(f"reversible: there is no variant {variant!r}.{nearest(slug, VARIANTS)} There are: {', '.join(VARIANTS)}.")
    options = tuple(
        Option(f.name, str(f.type), f.default, f.metadata["help"], {k: v for k, v in f.metadata.items() if k != "help"})
        for f in dataclasses.fields(Scheme)
        if f.name != "variant"
    )
    return Card(slug, "variant", "reversible", None, None, "", "reversible", __name__, options, aliases={"lambda": "lambda_"})
