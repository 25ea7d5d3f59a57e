"""Sites: the places of a model where a method can act, and how targets choose among them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from veneer.errors import NoMatch, nearest

ROLES: dict[str, str] = {
    "attn.q": "query projection of self-attention",
    "attn.k": "key projection of self-attention",
    "attn.v": "value projection of self-attention",
    "attn.o": "output projection of self-attention",
    "attn.qkv": "fused query, key and value projection whose rows are interleaved by head",
    "cross.q": "query projection of cross-attention",
    "cross.k": "key projection of cross-attention",
    "cross.v": "value projection of cross-attention",
    "cross.o": "output projection of cross-attention",
    "mlp.up": "first (or linear-branch) projection of the feed-forward network",
    "mlp.gate": "gate projection of a gated feed-forward network",
    "mlp.down": "last projection of the feed-forward network",
    "expert.up": "up projections of all experts of a mixture, stacked",
    "expert.gate": "gate projections of all experts, stacked",
    "expert.down": "down projections of all experts, stacked",
    "router": "router of a mixture of experts",
    "mixer.in": "input projection of a state-space or recurrent mixer",
    "mixer.out": "output projection of a state-space or recurrent mixer",
    "conv": "a convolution inside the backbone (residual or convolutional networks)",
    "norm.attn": "norm of the attention sub-layer",
    "norm.cross": "norm of the cross-attention sub-layer",
    "norm.mlp": "norm of the feed-forward sub-layer",
    "norm.embed": "norm of the embeddings",
    "norm.final": "norm after the last block",
    "norm.qk": "per-head norm of queries or keys",
    "norm.other": "any other norm",
    "embed.token": "token embedding table",
    "embed.position": "position embedding table or parameter",
    "embed.patch": "patch or frame embedding (a convolution or a linear layer)",
    "embed.other": "any other embedding",
    "attn": "a whole self-attention sub-layer: reads what its projections read, ends at its output projection",
    "cross": "a whole cross-attention sub-layer",
    "mlp": "a whole feed-forward sub-layer",
    "block": "one repeated block",
    "model": "the whole model: its input tokens",
    "stream": "the stream beside a block of a model that `veneer.reversible` made reversible",
    "pooler": "pooling projection between backbone and head",
    "head": "task or language-model head",
    "parameter": "a bare parameter (class token, layer scale …)",
    "other": "a layer with no known role",
}
"""Every role with its meaning. A parent such as `norm` or `embed` stands for all of its children."""


@dataclass(frozen=True)
class Site:
    """One place where a method can act.

    Args:
        name: unique name: the module's path, plus `.q`, `.k` … for a row range of a fused layer,
            or `<block path>.attn` / `.mlp` for a whole sub-layer.
        module: path of the module that is adapted (for a sub-layer: the one it ends at).
        role: a key of `ROLES`.
        kind: `linear` `conv` `embedding` `norm` (weight-bearing layers), `parameter` (a bare parameter,
            also a stack of matrices), `branch` (a sub-layer between `entry` and `module`),
            `attention` (the attention module itself: keys and values), `block`, `model`.
        depth: index of the block, counted over the whole model; None outside blocks.
        out_features, in_features: shape of the weight as [out, in]; an embedding table counts as [dim, vocabulary];
            a convolution as [out, in/groups · kernel]; a norm has both equal to its width; for branches, blocks and
            the model both are the hidden width; for attention they are the width of all key heads together.
        rows: (start, stop) of a fused weight's output rows; None for the whole weight.
        parameter: the parameter's name in the module.
        count: number of stacked matrices [count, out, in] (experts); 0 for an ordinary weight.
        kernel: kernel size of a convolution; () otherwise. groups: its groups.
        batch_dim: axis of the batch in the layer's input.
        entry: for a branch, path of the module whose input is the branch's input.
        heads, kv_heads, head_dim: of an attention module and of its projections; 0 elsewhere.
        causal: whether that attention is causal; of layers, sub-layers and blocks, whether their tokens see only earlier ones.
        post: for norms, True when it normalises the sum of a sub-layer's output and its residual (post-norm blocks);
            for branches, True when such a norm follows.
        channels_first: of norms, whether channels are axis 1 of what they read, as in convolutional networks.
        side: `encoder` or `decoder` in models that have both, else "".
        trainable_head: True for a `head` that belongs to the task and not to the pretrained model.
        index, length: position of the block in its stack and the stack's number of blocks.
        ordinal: position among the sites the method chose (set by the frame).
        tokens: for a block, how many tokens it reads, where the method that chose it found out; else 0.
    """

    name: str
    module: str
    role: str
    kind: str
    depth: int | None
    out_features: int
    in_features: int
    rows: tuple[int, int] | None = None
    parameter: str = "weight"
    count: int = 0
    kernel: tuple[int, ...] = ()
    groups: int = 1
    batch_dim: int = 0
    entry: str = ""
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    causal: bool = False
    post: bool = False
    channels_first: bool = False
    side: str = ""
    trainable_head: bool = False
    index: int = 0
    length: int = 0
    ordinal: int = 0
    tokens: int = 0

    @staticmethod
    def bare(W, kernel: tuple[int, ...] = ()) -> Site:
        """The site of a weight [out, in] (or [out, in, *kernel]) outside any model, for tests and for people."""
        inside = 1
        for size in W.shape[1:]:
            inside *= int(size)
        kind = "conv" if W.ndim > 2 else "linear" if W.ndim == 2 else "norm"
        out = int(W.shape[0])
        return Site("weight", "", "other", kind, None, out, inside if W.ndim > 1 else out, kernel=kernel or tuple(W.shape[2:]))


def whole_sites(sites: Sequence[Site]) -> list[Site]:
    """Fused weights as one site each, named like their module: how other libraries adapt them."""
    fused: dict[tuple[str, str], list[Site]] = {}
    for site in sites:
        if site.rows is not None and not site.count:
            fused.setdefault((site.module, site.parameter), []).append(site)
    return [
        replace(
            rows[0],
            name=module,
            role="attn.qkv" if rows[0].role.startswith("attn") else "other",
            rows=None,
            out_features=sum(s.out_features for s in rows),
        )
        for (module, _), rows in fused.items()
    ]


def tokens_of(targets: str) -> list[str]:
    """The single targets of a target string; blanks and commas separate."""
    return [t for t in re.split(r"[\s,]+", targets.strip()) if t]


def matches(token: str, site: Site) -> bool:
    """Whether one target token names this site: a role, a parent role, a wildcard over roles, or a module name.

    A module name is given whole, by its last components ("q_proj", "self.query"), or as a regular
    expression that matches the whole name.
    """
    token = token.removesuffix("?")
    if token in ROLES or any(r.startswith(token + ".") for r in ROLES):
        if token in ROLES and token in ("attn", "cross", "mlp"):
            return site.role == token
        return site.role == token or site.role.startswith(token + ".")
    if "*" in token and any(fnmatchcase(r, token) for r in ROLES):
        return fnmatchcase(site.role, token)
    if site.kind in ("branch", "block", "model", "attention"):
        return False
    if site.name == token or site.name.endswith("." + token):
        return True
    if site.rows is not None and (site.module == token or site.module.endswith("." + token)):
        return True
    try:
        return re.fullmatch(token, site.name) is not None
    except re.error:
        return False


def choose(sites: Sequence[Site], targets: str, *, kinds: Sequence[str], who: str, allow_unmatched: bool = False) -> list[Site]:
    """The sites of the given kinds that `targets` names, in model order.

    A token that ends in "?" may match nothing. Any other token that matches nothing raises `NoMatch`
    with the names there are, unless `allow_unmatched`.
    """
    usable = [s for s in sites if s.kind in kinds]
    found: dict[str, Site] = {}
    for token in tokens_of(targets):
        hit = [s for s in usable if matches(token, s)]
        if not hit and not token.endswith("?") and not allow_unmatched:
            raise NoMatch(_no_match(token, usable, who))
        found.update((s.name, s) for s in hit)
    if not found:
        raise NoMatch(_no_match(targets, usable, who))
    return [s for s in usable if s.name in found]


def _no_match(token: str, usable: Sequence[Site], who: str) -> str:
    roles = sorted({s.role for s in usable})
    if not roles:
        return f"{who}: target {token!r} matches no site: the model has no layer of a kind this method can use."
    names = {s.name for s in usable} | {s.name.rsplit(".", 1)[-1] for s in usable}
    near = "" if token in ROLES else nearest(token, [*ROLES, *names])
    return f"{who}: target {token!r} matches no site.{near}\nThe model has the roles {', '.join(roles)}."
