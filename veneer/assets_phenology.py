"""A small TSViT, pretrained here on made series of region A in 2019 (`veneer.tasks.phenology`), for the recipe and the tests.

Importing `veneer.assets` registers it. There is nothing to install: it is made once, in a minute, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.assets import _CARRIERS, MODELS, _converted, cache_folder

if TYPE_CHECKING:
    from veneer.models.tsvit import TSViTForSemanticSegmentation
    from veneer.tasks.data import Row

PRETRAINED = "tsvit-phenology"
PATCHES, STEPS, BATCH, LR, SEED = 1024, 320, 16, 4e-3, 0


def pretrained_dir() -> Path:
    """TSViT of width 64 (4 heads, 2 temporal and 2 spatial blocks, 8 × 8 pixels, 10 bands): an ordinary model folder.

    1,024 patches, 320 steps of 16 with AdamW, learning rate 4e-3 falling to nothing; about a minute on one core.
    """
    return _converted(f"{PRETRAINED}-1", _make)


def _make(folder: Path) -> None:
    from transformers import set_seed

    from veneer.models.tsvit import TSViTConfig, TSViTForSemanticSegmentation
    from veneer.tasks.phenology import CROPS, SOURCE, patches

    rows = patches(SOURCE, PATCHES, SEED)
    names = dict(enumerate(CROPS))
    means, stds = band_statistics(rows)
    config = TSViTConfig(
        image_size=8, hidden_size=64, head_dim=16, mlp_ratio=2, temporal_layers=2, spatial_layers=2, num_classes=len(CROPS),
        band_means=means, band_stds=stds, id2label=names, label2id={name: i for i, name in names.items()},
    )  # fmt: skip
    set_seed(SEED)
    model = TSViTForSemanticSegmentation(config)
    pretrain(model, rows, steps=STEPS, batch_size=BATCH, lr=LR)
    model.save_pretrained(folder)


def band_statistics(rows: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every band over all pictures of the rows."""
    import numpy as np

    bands = np.concatenate([row["series"].transpose(1, 0, 2, 3).reshape(row["series"].shape[1], -1) for row in rows], 1)
    return bands.mean(1).tolist(), bands.std(1).tolist()


def pretrain(model: TSViTForSemanticSegmentation, rows: Sequence[Row], *, steps: int, batch_size: int, lr: float) -> None:
    """Trains all of a model on rows with arrays (`series`, `dates`, `mask` as class indices), with a progress bar."""
    import torch
    from tqdm.auto import tqdm

    from veneer.tasks.series import days_of
    from veneer.tasks.series_batches import padded

    items: list[dict[str, Any]] = [
        {"series": row["series"], "days": days_of(row["dates"], len(row["series"])), "labels": row["mask"]} for row in rows
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), desc=f"pretraining {PRETRAINED}, once", unit="step", dynamic_ncols=True):
        batch = padded([items[i] for i in torch.randperm(len(items))[:batch_size].tolist()])
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


MODELS[PRETRAINED] = pretrained_dir
_CARRIERS[PRETRAINED] = cache_folder
