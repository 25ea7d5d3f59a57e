"""How Hugging Face PEFT names things: files, keys, targets, and the modules of a model as it sees them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import nn

from veneer import anatomy
from veneer.errors import BadFile, Unsupported
from veneer.forms import EmbeddingForm, Form, TransposedForm
from veneer.site import Site

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"

LAYERS = ("linear", "conv", "embedding", "norm")
"""Kinds of sites whose weight PEFT sees as a module."""

PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING")
"""PEFT's types whose keys stand without the inner `model.`"""


class Places:
    """The model's sites by module path; the row ranges of a fused weight count as one, as PEFT sees them."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.sites = anatomy.sites(model)
        self.prefix = str(getattr(model, "base_model_prefix", "") or "")

    @cached_property
    def at(self) -> dict[str, list[Site]]:
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.kind in (*LAYERS, "parameter"):
                found.setdefault(site.module, []).append(site)
        return found

    def path(self, name: str) -> str | None:
        """The module's path here; saved from a model with or without a head, it may differ in the backbone's name."""
        tries = (name, name.removeprefix(self.prefix + "."), f"{self.prefix}.{name}")
        return next((t for t in tries if t in self.at), None)

    def whole(self, path: str) -> Site:
        """The one site of a module's weight."""
        weights = [s for s in self.at[path] if s.kind in LAYERS and not s.parameter.endswith(("k_proj_weight", "v_proj_weight"))]
        if not weights:
            raise Unsupported(f"PEFT format: {path} is not a layer with one weight.")
        first = weights[0]
        if first.rows is None:
            return first
        return replace(first, name=path, role="attn.qkv", rows=None, out_features=sum(s.out_features for s in weights))

    def bare(self, path: str, parameter: str) -> Site | None:
        return next((s for s in self.at.get(path, ()) if s.kind == "parameter" and s.parameter == parameter), None)

    def only(self, kind: str) -> list[Site]:
        return [s for s in self.sites if s.kind == kind]


def picks(targets: Any, path: str) -> bool:
    """Whether PEFT's `target_modules` (a list of names, or a regular expression) names this module."""
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, path) is not None
        except re.error:
            return False
    return any(path == t or path.endswith(f".{t}") for t in targets or ())


def pattern_value(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The entry of `rank_pattern` or `alpha_pattern` for a module: the first key that is its name, its end, or matches it."""
    for key, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        except re.error:
            raise BadFile(f"{CONFIG}: the pattern {key!r} is not a regular expression.") from None
    return default


def short_targets(paths: Sequence[str], everything: Iterable[str]) -> list[str]:
    """The shortest list of names that picks exactly these modules: last names where they do, else whole paths."""
    last = sorted({p.rpartition(".")[2] for p in paths})
    wanted = set(paths)
    exact = all((p in wanted) == picks(last, p) for p in {*everything, *paths})
    return last if exact and not any(n.isdigit() for n in last) else sorted(wanted)


SLOTS = (
    r"lora_\w+|ia3_l|ln_tuning_layers|prompt_embeddings|vera_\w+|randlora_\w+|delora_\w+|gralora_\w+|hada_\w+|lokr_\w+|"
    r"fourierft_spectrum|waveft_spectrum|c3a_kernel|oft_R|oft_embedding_R|boft_[Rs]|hra_u|road_\w+|shira_\w+|miss_block"
)
"""What the tensors of PEFT's methods are called inside the module they adapt."""

TUNED = re.compile(rf"(?:^|\.)({SLOTS}|base_layer\.(?:weight|bias)$|original_module)(\..*)?$")


def split_key(key: str, prompt: bool = False) -> tuple[str, str]:
    """Module path and slot of a key: "base_model.model.h.0.attn.lora_A.weight" → ("h.0.attn", "lora_A.weight")."""
    key = key.removeprefix("base_model." if prompt or not key.startswith("base_model.model.") else "base_model.model.")
    found = TUNED.search(key)
    if found is None:
        owner, _, slot = key.rpartition(".")
        owner = re.sub(r"\.modules_to_save(\.default)?", "", owner)
    else:
        owner, slot = key[: found.start()], key[found.start() :].lstrip(".")
    words = slot.split(".")
    if words[0].startswith(("lora_", "ln_")) and words[-1] in ("weight", "bias"):
        slot = f"{words[0]}.{words[-1]}"  # some writers leave the adapter's name between the two
    return owner.replace(".base_layer", ""), slot


def turned(form: Form) -> bool:
    """Whether the layer stores its weight as [in, out]."""
    return isinstance(form, TransposedForm | EmbeddingForm)


def stored_shape(places: Places, site: Site) -> tuple[int, ...]:
    held = places.model.get_submodule(site.module)._parameters[site.parameter]
    assert held is not None
    return tuple(held.shape)


def prefix_sites(places: Places, where: str) -> list[Site]:
    """The attention modules that PEFT's table serves, in its order."""
    sites = [s for s in places.only("attention") if s.role == "attn"]
    if any(s.side for s in sites):
        raise Unsupported(
            f"{where}: PEFT's prefix tuning of encoder-decoders gives the decoder half of its table, twice, under position biases; "
            "that cannot be matched here. Attach 'prefix-tuning' and train it, or use 'prompt-tuning', whose files agree."
        )
    if not sites:
        raise Unsupported(f"{where}: this model has no attention module that takes learned keys and values.")
    return sites


def check_first_position(places: Places, task: str | None, where: str) -> None:
    """With PEFT, a head that reads the first position of an encoder's output reads the first learned token."""
    inner = getattr(places.model, "base_model", None)
    pools = getattr(inner, "pooler", None) is not None
    if task == "SEQ_CLS" and not pools and not any(s.causal for s in places.only("attention")):
        raise Unsupported(
            f"{where}: the head of {type(places.model).__name__} reads the first position, which is a learned token with PEFT and the "
            "text's first token here, so the answers would differ. Attach 'prompt-tuning' or 'prefix-tuning' and train it here."
        )


TASKS = (
    (re.compile("ForSequenceClassification$"), "SEQ_CLS"),
    (re.compile("ForTokenClassification$"), "TOKEN_CLS"),
    (re.compile("ForQuestionAnswering$"), "QUESTION_ANS"),
    (re.compile("ForConditionalGeneration$"), "SEQ_2_SEQ_LM"),
    (re.compile("(ForCausalLM|LMHeadModel)$"), "CAUSAL_LM"),
)


CLASSIFIERS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def task_type(model: nn.Module) -> str | None:
    """PEFT's name of the model's task."""
    kind = type(model).__name__.removeprefix("Adapted")
    task = next((task for pattern, task in TASKS if pattern.search(kind)), None)
    return None if task == "SEQ_2_SEQ_LM" and not getattr(getattr(model, "config", None), "is_encoder_decoder", False) else task
