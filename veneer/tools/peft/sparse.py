"""Methods that train numbers at fixed positions of a matrix: PEFT's SHIRA, FOURIERFT and WAVEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from veneer.errors import BadFile
from veneer.site import Site
from veneer.tools.peft.layered import Kept, Layered, Places


def seed_of_shira(at: Places, before: Mapping[str, Any]) -> dict[str, Any] | None:
    """The seed, where all positions come from one; they stand in the file in any case."""
    seeds = {method.seed if method.mask == "random" else None for method, _ in at.values()}
    return {} if before else {"mask_type": "random", "random_seed": seeds.pop() if len(seeds) == 1 else None}


def checked(method: Any, slots: Mapping[str, Tensor], site: Site) -> dict[str, Any]:
    """No hyper-parameter; raises `BadFile` for positions outside of the weight or out of order, which no kernel looks at again."""
    at = slots.get("shira_indices")
    if at is not None and at.ndim == 2 and len(at) == 2:
        row, column = at.long()
        flat = row * site.in_features + column
        inside = (row >= 0) & (row < site.out_features) & (column >= 0) & (column < site.in_features)
        if not bool(inside.all()) or bool((flat.diff() <= 0).any()):
            raise BadFile(f"shira_indices of {site.name} are not positions in its weight, row by row; the file is damaged.")
    return {}


def count(slot: str) -> Callable[[Any, Mapping[str, Tensor], Site], dict[str, Any]]:
    """n as the number of coefficients in the file."""
    return lambda method, slots, site: {"n": slots[slot].numel()} if slot in slots else {}


def proportional(at: Places, before: Mapping[str, Any]) -> dict[str, Any]:
    """`proportional_parameters`, where it was loaded so and PEFT comes to the same counts again."""
    sizes = {path: site.in_features * site.out_features for path, (_, site) in at.items()}
    budget, total = int(before.get("n_frequency") or 0) * len(sizes), sum(sizes.values())
    if before.get("proportional_parameters") and all(m.count(s) == max(1, round(sizes[p] / total * budget)) for p, (m, s) in at.items()):
        return {key: before[key] for key in ("proportional_parameters", "n_frequency", "n_frequency_pattern") if key in before}
    return {"proportional_parameters": False}


SCATTERED = {"n_frequency": "n", "scaling": "alpha", "random_loc_seed": "seed"}

SPARSE = (
    Layered(
        "SHIRA", "shira",
        (Kept("shira_weight", "v"), Kept("shira_indices", "indices", lambda t, site: t.long(), lambda t, site: t.int())),
        options={"r": "r"}, ours=lambda config: {"seed": config.get("random_seed") or 0}, sized=checked, theirs=seed_of_shira,
        biases=False,
    ),
    Layered(
        "FOURIERFT", "fourierft", (Kept("fourierft_spectrum", "c"),), options=SCATTERED, patterns={"n": "n_frequency_pattern"},
        anchored=False, sized=count("fourierft_spectrum"), transposed=True,
    ),
    Layered(
        "WAVEFT", "waveft", (Kept("waveft_spectrum", "c"),), options={**SCATTERED, "wavelet_family": "wavelet", "use_idwt": "use_idwt"},
        patterns={"n": "n_frequency_pattern"}, values={"n": lambda method, site: method.count(site)},
        sized=count("waveft_spectrum"), theirs=proportional, transposed=True,
    ),
)  # fmt: skip
"""As they stand in PEFT's format."""
