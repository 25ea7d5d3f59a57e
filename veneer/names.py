"""Names that several papers use: what each may mean, and which of them is here. No torch: it is asked before work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """One paper behind a name.

    Args:
        slug: a name of its own, which the registry also knows where the method is here.
        what: the method, in words. source: arXiv id, or the venue of a paper without one.
        here: the method's name in this library; "" where it is not here.
    """

    slug: str
    what: str
    source: str
    here: str = ""

    def said(self, has: Collection[str]) -> str:
        """In words; with its name here, if it is among the slugs there are."""
        return f"{self.what} ({self.source})" + (f", here {self.here!r}" if self.here in has else "")


def _meanings(*rows: str) -> tuple[Meaning, ...]:
    """Meanings from "slug | what | source | here"."""
    return tuple(Meaning(*(part.strip() for part in row.split("|"))) for row in rows)


CLASHES: dict[str, tuple[Meaning, ...]] = {
    "deft": _meanings(
        "deft-density | density-efficient fine-tuning | arXiv:2402.01911 | deft",
        "deft-decompositional | decompositional fine-tuning of text-to-image models, PEFT's DEFT | NeurIPS 2025",
    ),
    "cpt": _meanings(
        "cpt-context | context-aware prompt tuning, PEFT's CPT | arXiv:2410.17222",
        "cpt-continual | continual prompt tuning | arXiv:2203.06654",
    ),
    "spt": _meanings(
        "spt-sensitivity | sensitivity-aware tuning | arXiv:2303.08566 | spt",
        "spt-selective | selective prompt tuning | arXiv:2310.20127",
    ),
    "dept": _meanings(
        "dept-decomposed | decomposed prompt tuning | arXiv:2309.05173 | dept",
        "dept-test-time | prompt tuning for test-time domain adaptation | arXiv:2210.04831",
    ),
    "tpt": _meanings(
        "tpt-transferable | transferable prompt tuning | arXiv:2111.06719",
        "tpt-test-time | test-time prompt tuning | arXiv:2209.07511",
    ),
    "lpt": _meanings(
        "lpt-late | late prompt tuning | arXiv:2210.11292",
        "lpt-long-tailed | long-tailed prompt tuning | arXiv:2210.01033",
    ),
    "ppt": _meanings(
        "ppt-pretrained | pre-trained prompt tuning | arXiv:2109.04332",
        "ppt-score | the performance-parameter trade-off, a benchmark's score and no method | arXiv:2402.02242",
    ),
    "sam": _meanings(
        "sam-mask | second-order approximation mask | arXiv:2211.15583",
        "sam-segmentation | Segment Anything, a model | arXiv:2304.02643",
    ),
    "evp": _meanings(
        "evp-explicit | explicit visual prompting | arXiv:2303.10883",
        "evp-pixel | visual prompts at the pixel level | arXiv:2212.10556",
    ),
    "lst": _meanings(
        "lst-ladder | ladder side-tuning | arXiv:2206.06522 | ladder-side-tuning",
        "last-low-rank | low-rank attention side-tuning, LAST | arXiv:2402.04009",
    ),
    "meft": _meanings(
        "meft-reversible | reversible fine-tuning, which any method here takes as --reversible meft1 | arXiv:2306.00477",
        "meft-sparse | memory-efficient fine-tuning through sparse adapters | arXiv:2406.04984",
    ),
    "bone": _meanings(
        "bone-block | block-affine adaptation, as first published | arXiv:2409.15371 | bone",
        "miss-shards | matrix shard sharing, its later form and PEFT's MISS | arXiv:2409.15371 | miss",
    ),
    "autolora": _meanings(
        "autolora-ranks | ranks found by meta learning | arXiv:2403.09113",
        "autolora-robust | robust fine-tuning with a low-rank branch | arXiv:2310.01818",
    ),
    "pasta": _meanings(
        "pasta-tokens | special token adaptation | arXiv:2210.04382",
        "pasta-steering | post-hoc attention steering | arXiv:2311.02262",
    ),
    "hydra": _meanings(
        "hydra-heads | multi-head low-rank adaptation | arXiv:2309.06922",
        "hydralora | asymmetric LoRA with several heads, HydraLoRA | arXiv:2404.19245",
    ),
    "san": _meanings(
        "san-side | side adapter network for open-vocabulary segmentation | arXiv:2302.12242",
        "san-synaptic | a LoRA-like rescaling after long-term potentiation | arXiv:2409.06706",
    ),
    "apt": _meanings(
        "apt-prefix | adaptive prefix tuning | arXiv:2305.15212",
        "apt-pruning | adaptive pruning and tuning | arXiv:2401.12200",
    ),
    "ipt": _meanings(
        "ipt-intrinsic | intrinsic prompt tuning | arXiv:2110.07867",
        "ipt-instance | instance-wise prompt tuning | arXiv:2206.01958",
    ),
    "s-lora": _meanings(
        "s-lora-serving | a serving system for many LoRAs | arXiv:2311.03285",
        "s2-lora-shared | sparsely shared LoRA | arXiv:2309.11756 | s2-lora",
        "s2ft-structured | structured sparse fine-tuning | arXiv:2412.06289 | s2ft",
    ),
    "dlora": _meanings(
        "dlora-edge | LoRA trained between cloud and device | arXiv:2404.05182",
        "dlora-serving | a serving system that merges and unmerges | OSDI 2024",
        "dylora | rank-nested LoRA | arXiv:2210.07558",
        "delora-decoupled | strength trained apart from directions | arXiv:2503.18225 | delora",
    ),
    "mole": _meanings(
        "mole-fusion | gates over trained LoRAs, MoLE | arXiv:2404.13628",
        "mola-layers | more LoRA experts in higher layers, MoLA | arXiv:2402.08562 | mola",
        "moelora | LoRA experts for medical tasks, MOELoRA | arXiv:2310.18339",
        "molora | experts of instruction tuning, MoLORA | arXiv:2309.05444",
        "mixlora | LoRA experts inside feed-forwards, MixLoRA | arXiv:2404.15159",
    ),
}  # fmt: skip
"""Name as people type it → the papers that use it."""

SAME = {
    "last": "lst",
    "miss": "bone",
    "mola": "mole",
    "s2-lora": "s-lora",
    "s2ft": "s-lora",
    "delora": "dlora",
    "moelora": "mole",
    "molora": "mole",
    "mixlora": "mole",
    "slora": "s-lora",
    "dylora": "dlora",
}
"""Other spellings of those names."""


def meanings(name: str) -> tuple[Meaning, ...]:
    """The papers that a name may mean; none where it is clear."""
    return CLASHES.get(SAME.get(name, name), ())


def known_as(name: str) -> str:
    """The slug behind a qualified name such as "deft-density"; the name itself where there is none."""
    found = {m.slug: m.here for several in CLASHES.values() for m in several if m.here}
    return found.get(name, name)


def sentence(name: str, has: Collection[str]) -> str:
    """What is said of a name that means several papers and is no method here: one sentence, or "" where it is clear.

    `has` are the slugs there are."""
    exact = [m for several in CLASHES.values() for m in several if m.slug == name]
    found = meanings(name)
    if exact and not found:
        return f"The method {name!r} is not in veneer: {exact[0].said(has)}."
    if not found:
        return ""
    here = [m.here for m in found if m.here in has]
    carried = f"veneer has {' and '.join(repr(h) for h in here)}" if here else "veneer has none of them as a method"
    return f"{name!r} is the name of several methods: {'; '.join(m.said(has) for m in found)}; {carried}."


def note(slug: str, has: Collection[str]) -> str:
    """For a method that is here under a name that others use, too: which of them it is; "" where its name is clear."""
    mine = next((m for m in meanings(slug) if m.here == slug), None)
    others = [m.said(has) for m in meanings(slug) if m is not mine]
    return f"Also {mine.slug!r}; not to be taken for {'; '.join(others)}." if mine and others else ""
