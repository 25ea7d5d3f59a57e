"""How many tokens merge in each block of a vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from veneer.errors import BadValue
from veneer.maths.image_side import on_images
from veneer.method import Method
from veneer.option import option
from veneer.site import Site, choose


@dataclass(frozen=True)
class Scheduled(Method):
    """r tokens go in every block, or those of a schedule; a block with fewer than r pairs left merges those it has.

    Blocks in leave_out merge nothing, and what went before passes through them.
    """

    r: int = option(16, "tokens merged away in every block", ge=1)
    schedule: tuple[int, ...] | None = option(None, "tokens merged away in each block, instead of r; 0 after its end", ge=0)
    protected: int = option(1, "tokens at the start that never merge: class and distillation tokens, registers", ge=0)
    tokens: int | None = option(None, "tokens the first block reads; None: as many as the model has positions", ge=2)

    splits_blocks = True
    kinds = ("block",)
    default_targets = "block"

    def validate(self) -> None:
        if self.schedule is not None and not isinstance(self.schedule, tuple):
            raise BadValue(f"{self.label}: schedule={self.schedule!r} must be one number a block, such as (16, 16, 10).")

    def views(self, sites: Sequence[Site]) -> list[Site]:
        """The blocks of the picture's side, told how many tokens they read at the model's own size."""
        blocks = on_images([s for s in sites if s.kind == "block"], sites, self.label)
        tables = on_images([s for s in sites if s.role == "embed.position"], sites, self.label)
        return [replace(s, tokens=self.tokens or max((t.in_features for t in tables), default=0)) for s in blocks]

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Every block, also those that merge nothing: what the first ones merged passes through."""
        asked = self.targets or self.default_targets
        found = choose(self.views(sites), asked, kinds=self.kinds, who=self.label, allow_unmatched=self.targets is None)
        if (stacks := sum(s.index == 0 for s in found)) != 1 or len(found) != found[0].length:
            raise BadValue(f"{self.label}: it merges through all blocks of one stack, and {asked!r} names {len(found)} blocks of {stacks}.")
        return found

    def gone(self, site: Site) -> tuple[int, ...]:
        """Tokens that go in each block of the site's stack."""
        out: list[int] = []
        for index in range(site.length):
            left = (site.tokens - sum(out) - self.protected) // 2 if site.tokens else self.r
            wanted = min(self.r, max(left, 0)) if self.schedule is None else self.schedule[index] if index < len(self.schedule) else 0
            out.append(0 if index + site.depth - site.index in self.leave_out else wanted)  # type: ignore[operator]
        return tuple(out)

    def check(self, site: Site) -> None:
        if site.batch_dim:
            raise self.refuse("the block {at} reads [tokens, batch, width]; it needs the batch first.", site)
        if self.schedule is not None and len(self.schedule) > site.length:
            raise self.refuse(f"schedule names {len(self.schedule)} blocks, and the stack {{at}} has {site.length}.", site)
        if site.tokens:
            self.allow(self.gone(site)[site.index], site.tokens - sum(self.gone(site)[: site.index]), site)
            if not any(self.gone(site)):
                raise self.refuse(f"no two of {site.tokens} tokens may merge {{at}}; choose protected below {site.tokens - 1}.", site)

    def allow(self, r: int, n: int, site: Site) -> None:
        most = max(n - self.protected, 0) // 2
        if r > most:
            what = f"{r} tokens should merge and the block {{at}} reads {n}, of which {most} can"
            raise self.refuse(f"{what}; choose schedule or r so that at most {most} do, or tokens= as many as your pictures have.", site)
