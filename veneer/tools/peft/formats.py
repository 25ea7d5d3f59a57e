"""The table of PEFT's types: how each is read, and written."""

from __future__ import annotations

from veneer.tools.peft.adalora import read_adalora, write_adalora
from veneer.tools.peft.blocks import BLOCKS
from veneer.tools.peft.format import Format
from veneer.tools.peft.lora import read_lora, write_lora_or_dora
from veneer.tools.peft.products import PRODUCTS
from veneer.tools.peft.prompts import read_prefix, read_prompt, write_prefix, write_prompt
from veneer.tools.peft.rotations import ROTATIONS
from veneer.tools.peft.shared import SHARED
from veneer.tools.peft.sparse import SPARSE
from veneer.tools.peft.vectors import read_ia3, read_norms, write_ia3, write_norms

FORMATS = {
    f.kind: f
    for f in (
        Format("LORA", ("lora", "dora"), read_lora, write_lora_or_dora, biases=True),
        Format("ADALORA", ("adalora",), read_adalora, write_adalora),
        Format("IA3", ("ia3",), read_ia3, write_ia3),
        Format("LN_TUNING", ("ln-tuning",), read_norms, write_norms),
        Format("PROMPT_TUNING", ("prompt-tuning",), read_prompt, write_prompt),
        Format("PREFIX_TUNING", ("prefix-tuning",), read_prefix, write_prefix),
        *(layered.format for layered in (*BLOCKS, *PRODUCTS, *ROTATIONS, *SHARED, *SPARSE)),
    )
}
"""By their names in the config."""

OF_METHOD = {slug: f for f in FORMATS.values() for slug in f.slugs}
"""The type that holds a method of ours, by its slug."""
