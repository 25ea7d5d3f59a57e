"""Weights of TSViT as its authors publish them (github.com/michaeltrs/DeepSatModels, Apache-2.0), under this library's names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from veneer.errors import Mismatch

NAMES: tuple[tuple[str, str], ...] = (
    (r"to_patch_embedding\.1\.", "tsvit.embeddings.patch_embedding."),
    (r"to_temporal_embedding_input\.", "tsvit.embeddings.date_embedding."),
    (r"temporal_token$", "tsvit.class_tokens.tokens"),
    (r"space_pos_embedding$", "tsvit.positions.position"),
    (r"temporal_\w*[tT]ransformer\.", "tsvit.temporal_encoder."),
    (r"space_\w*[tT]ransformer\.", "tsvit.spatial_encoder."),
    (r"\.(\d+)\.0\.norm\.", r".\1.attention_norm."),
    (r"\.(\d+)\.0\.fn\.to_qkv\.", r".\1.attention.qkv."),
    (r"\.(\d+)\.0\.fn\.to_out\.0\.", r".\1.attention.out_proj."),
    (r"\.(\d+)\.1\.norm\.", r".\1.mlp_norm."),
    (r"\.(\d+)\.1\.fn\.net\.0\.", r".\1.mlp.fc1."),
    (r"\.(\d+)\.1\.fn\.net\.3\.", r".\1.mlp.fc2."),
    (r"^mlp_head\.0\.", "head.norm."),
    (r"^mlp_head\.1\.", "head.projection."),
    (r"^mlp_change\.", "classifier."),
)


def our_name(name: str) -> str:
    """A published tensor's name in `TSViTForSemanticSegmentation`."""
    for pattern, ours in NAMES:
        name = re.sub(pattern, ours, name)
    return name


def load_published(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies published tensors into a model of the same sizes, made with raster_runs=True.

    Raises `Mismatch` for names or shapes that do not fit, and changes nothing then: nothing is left at random silently.
    """
    renamed = {our_name(name): tensor for name, tensor in tensors.items()}
    own = model.state_dict()
    missing, surplus = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or surplus:
        raise Mismatch(f"The published weights lack {missing[:3] or 'nothing'} and have {surplus[:3] or 'nothing'} beyond the model's own.")
    wrong = next((name for name in own if own[name].shape != renamed[name].shape), None)
    if wrong is not None:
        raise Mismatch(f"{wrong}: published {list(renamed[wrong].shape)}, here {list(own[wrong].shape)}; make the model with those sizes.")
    model.load_state_dict(renamed)
