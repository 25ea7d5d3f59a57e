"""Point-MAE's pre-training: hidden patches of a cloud are drawn from the visible ones (2022, arXiv:2203.06604).

`python -m veneer.models.point_mae_pretraining` makes the small model that this library brings along: about six minutes on one
core, on the furniture that is not tested on, without its labels.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from veneer.errors import BadValue, VeneerError
from veneer.models.point_mae import PointMAEModel, PointMAEPreTrainedModel
from veneer.models.point_mae_config import PointMAEConfig
from veneer.models.point_mae_layers import PointMAEEncoder
from veneer.train.state import read_state, write_state

SMALL: dict[str, Any] = {
    "num_points": 1024, "num_groups": 32, "group_size": 32, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "point_widths": [32, 64, 128], "head_widths": [], "decoder_layers": 2,
}  # fmt: skip
"""The model that lies in this package."""


class PointMAEForPreTraining(PointMAEPreTrainedModel):
    """The encoder reads the visible patches alone; a decoder puts a shared token in the place of the hidden ones and draws them.

    The loss is the squared Chamfer distance between drawn and true points of a hidden patch, seen from its centre.
    """

    def __init__(self, config: PointMAEConfig) -> None:
        super().__init__(config)
        self.point_mae = PointMAEModel(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.decoder_positions = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, config.hidden_size))
        self.decoder = PointMAEEncoder(config, config.decoder_layers)
        self.predict = nn.Linear(config.hidden_size, 3 * config.group_size)
        self.post_init()

    @property
    def hidden(self) -> int:
        """Hidden patches of a cloud."""
        return int(self.config.mask_ratio * self.config.num_groups)

    def forward(self, points: Tensor, generator: Generator | None = None) -> Tensor:
        """The loss on points [B, N, 3]; `generator` draws which patches are hidden."""
        tokens, positions, centers, patches = self.point_mae.embeddings(points)
        order = torch.rand(patches.shape[:2], generator=generator).argsort(1).to(points.device)
        seen, unseen = order[:, self.hidden :], order[:, : self.hidden]
        visible = self.point_mae.encoder(pick(tokens[:, 1:], seen), pick(positions[:, 1:], seen))
        where = self.decoder_positions(pick(centers, order.flip(1)).to(tokens.dtype))  # the visible ones first
        empty = self.mask_token.expand(len(points), self.hidden, -1)
        drawn = self.predict(self.decoder(torch.cat([visible, empty], 1), where)[:, -self.hidden :])
        return chamfer(drawn.unflatten(-1, (-1, 3)), pick(patches.flatten(2), unseen.flip(1)).unflatten(-1, (-1, 3)))


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """rows [B, n, D] at index [B, m]."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[-1]))


def chamfer(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared distance from every point of a [..., k, 3] to the nearest of b [..., m, 3], plus the same the other way."""
    square = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
    return square.amin(-1).mean() + square.amin(-2).mean()


def augmented(points: Tensor, generator: Generator) -> Tensor:
    """Clouds scaled by 2/3 … 3/2 and moved by up to 0.2 along each axis."""
    scale = torch.empty(len(points), 1, 3).uniform_(2 / 3, 3 / 2, generator=generator)
    return points * scale + torch.empty(len(points), 1, 3).uniform_(-0.2, 0.2, generator=generator)


def pretrain(
    config: PointMAEConfig, clouds: Tensor, epochs: int, batch: int = 64, lr: float = 1e-3, seed: int = 0, state: Path | None = None
) -> PointMAEForPreTraining:
    """A model trained on clouds [n, at least num_points, 3] in the unit ball; each pass takes other points of every cloud.

    `state` is a file that is written after every pass and removed at the end; where it is there, training goes on from it.
    Raises `BadValue` if it belongs to a training with other settings.
    """
    from tqdm.auto import tqdm

    torch.manual_seed(seed)
    model, generator = PointMAEForPreTraining(config).train(), Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    each = -(-len(clouds) // batch)
    settings = {"sizes": config.to_json_string(), "numbers": [len(clouds), epochs, batch, lr, seed]}
    done = _taken_up(state, settings, model, optimiser, generator)
    with tqdm(total=epochs * each, initial=done * each, desc="pre-training", unit="step", dynamic_ncols=True) as bar:
        for epoch in range(done, epochs):
            for i, rows in enumerate(torch.randperm(len(clouds), generator=generator).split(batch)):
                optimiser.param_groups[0]["lr"] = lr * share(epoch * each + i, epochs * each)
                some = torch.randperm(clouds.shape[1], generator=generator)[: config.num_points]
                loss = model(augmented(clouds[rows][:, some], generator), generator)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
                optimiser.step()
                bar.update()
                bar.set_postfix(loss=f"{float(loss.detach()):.4f}", refresh=False)
            if state is not None:
                held = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "generator": generator.get_state()}
                write_state(state, {**settings, **held, "epoch": epoch + 1, "random": torch.get_rng_state()})
    if state is not None:
        state.unlink(missing_ok=True)
    return model.eval()


def share(step: int, steps: int) -> float:
    """The part of the learning rate at a step: a rise over the first twentieth, then half a cosine."""
    return min((step + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3)


def _taken_up(
    state: Path | None, settings: dict[str, Any], model: nn.Module, optimiser: torch.optim.Optimizer, generator: Generator
) -> int:
    """Puts everything back as the file has it; gives the number of passes done."""
    if state is None or not state.is_file():
        return 0
    held = read_state(state)
    if {name: held[name] for name in settings} != settings:
        raise BadValue(f"{state} holds a training with other settings. Give them again, or remove the file to start anew.")
    model.load_state_dict(held["model"])
    optimiser.load_state_dict(held["optimiser"])
    generator.set_state(held["generator"])
    torch.set_rng_state(held["random"])
    return held["epoch"]


def main() -> None:
    """Trains on the furniture and writes the encoder to a folder that `from_pretrained` reads; goes on where it was interrupted."""
    import numpy as np
    from transformers.utils import logging

    from veneer.assets_points import POINT_MAE, furniture_parts
    from veneer.tasks.point_files import unit_ball

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=POINT_MAE, help="folder to write")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--sizes", type=json.loads, default={}, help="other sizes, such as '{\"hidden_size\": 384}'")
    given = parser.parse_args()
    state = given.out.with_name(given.out.name + ".begun.safetensors")
    try:
        parts = furniture_parts()
        clouds = torch.from_numpy(np.stack([unit_ball(row["points"]) for name in ("train", "validation") for row in parts[name]]))
        config = PointMAEConfig(**{**SMALL, **given.sizes})
        model = pretrain(config, clouds, given.epochs, state=state)
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted; the same command goes on after the last whole pass.") from None
    except VeneerError as error:
        raise SystemExit(f"Error: {error}") from None
    logging.disable_progress_bar()
    model.point_mae.standardise(clouds[:, : config.num_points])
    model.point_mae.save_pretrained(given.out)
    for file in given.out.iterdir():
        file.chmod(0o644)
    print(f"{given.out}: {sum(p.numel() for p in model.point_mae.parameters()):,} parameters")


if __name__ == "__main__":
    main()
