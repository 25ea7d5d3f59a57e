"""The small text-to-image pipeline of the recipes, made on first use from pictures that arrive in a package.

Importing `veneer.assets` registers it; its name and install line stand there with the others.
"""

from __future__ import annotations

from pathlib import Path

from veneer.assets import _CARRIERS, INSTALL, MODELS, _converted, _fashion_source

TINY = "tiny-diffusion"

INSTALL |= {TINY: INSTALL["fashion-mnist"]}


def tiny_diffusion_dir() -> Path:
    """A latent diffusion pipeline (UNet of 1.1 M parameters, pictures of 32 × 32) that has learned clothes, but no shoes and no bags.

    No small pretrained one can be had: this is trained here, once, in about four minutes of one core, on 6,000 pictures of
    Fashion-MNIST (licence: MIT; Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747).
    """
    _fashion_source()

    def make(folder: Path) -> None:
        from veneer.models.fashion_diffusion import make

        make(folder)

    return _converted(TINY, make, "model_index.json")


MODELS |= {TINY: tiny_diffusion_dir}
_CARRIERS |= {TINY: _fashion_source}
