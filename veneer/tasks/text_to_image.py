"""Text-to-image: a diffusion pipeline is taught pictures and their descriptions, or one subject (DreamBooth, arXiv:2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from veneer.errors import BadFile, BadValue, Unsupported
from veneer.option import option
from veneer.tasks.data import Row, Table
from veneer.tasks.described_pictures import check_pictures, column_names, needs_description, prompt_of
from veneer.tasks.metric import Measured, bootstrap
from veneer.tasks.task import Options, Settings, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from veneer.tuned import Tuned


@dataclass(frozen=True)
class Painting(Settings):
    template: str | None = option(None, "prompt of a row, such as 'a sketch of {description}', or of all rows")
    prior_prompt: str | None = option(None, "what the untouched model paints so that it is not unlearned (DreamBooth)")
    prior_pictures: int = option(50, "pictures that the prior is made of", ge=1)
    prior_weight: float = option(1.0, "weight of the prior in the loss", ge=0)
    text_encoder: bool = option(False, "adapt the text encoders too")
    sample_steps: int = option(25, "sampling steps of the pictures the run makes", ge=1)
    guidance: float | None = option(None, "guidance of these pictures; the pipeline's own if not given", ge=0)


class TextToImage(Task):
    """Pictures with descriptions. Metric: mean squared error of the network's prediction at noise and levels fixed for each row."""

    slug: ClassVar[str] = "text-to-image"
    main: ClassVar[str] = "loss"
    greater: ClassVar[bool] = False
    settings: ClassVar[type[Settings]] = Painting
    grouped: ClassVar[bool] = False

    # -- data -------------------------------------------------------------------------------------------------

    @classmethod
    def columns(cls, table: Table, options: Options) -> Options:
        import dataclasses

        said, _ = column_names(table, options.text, options.own.get("template"))
        return dataclasses.replace(options, text=said)

    def check(self, table: Table, split: str) -> None:
        said, attributes = column_names(table, self.options.text, self.own.template)
        if split == "train":
            self.facts["attributes"] = attributes
            self.seen: dict[str, str] = {}
        for i, row in enumerate(table.rows):
            if said and needs_description(self.own.template, said) and not str(row.get(said) or "").strip():
                raise BadValue(f"{table.place(i)} ({split}): the picture has no description; fill the column {said!r}.")
        check_pictures(table, split, getattr(self, "seen", {}))

    @classmethod
    def key(cls, options: Options) -> str:
        return ""

    def said(self) -> str:
        text = f"text={self.options.text!r} (--text)" if self.options.text else ""
        template = f"template={self.own.template!r} (--task 'text-to-image(template=…)')" if self.own.template else ""
        return ", ".join(part for part in (text, template) if part)

    @classmethod
    def bare(cls, row: Row) -> Any:
        return row

    def prompt(self, row: Row) -> str:
        """The prompt of a row."""
        return prompt_of(row, self.options.text, self.facts.get("attributes"), self.own.template)

    # -- model ------------------------------------------------------------------------------------------------

    def load(self, model: str, **kwargs: Any) -> tuple[nn.Module, Any]:
        """The pipeline as one module, `veneer.models.diffusion.Diffusion`; it also stands for the processor."""
        from veneer.assets import resolve
        from veneer.models.diffusion import Diffusion
        from veneer.models.pipelines import default_size, load_pipeline
        from veneer.models.text_conditions import context, family_of

        folder = resolve(model)
        if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
            raise BadFile(f"{folder} is no pipeline of diffusers: it holds no model_index.json.")
        dtype = kwargs.pop("dtype", None)
        if kwargs:
            raise Unsupported("quantise is for models of transformers; pipelines of diffusers train in 16 or 32 bit here. Leave it out.")
        pipeline, options = load_pipeline(folder, dtype), self.options
        family_of(pipeline)
        context(pipeline, options.max_length)
        made = Diffusion(pipeline, options.image_size or default_size(pipeline), self.own.text_encoder, options.max_length)
        made.config._name_or_path = model
        return made, made

    def encode(self, rows: Sequence[Row], processor: Any) -> Sequence[dict[str, Any]]:
        from veneer.tasks.latent_rows import LatentRows

        return LatentRows(rows, lambda row: (row["image"], self.prompt(row)), processor)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        from veneer.tasks.latent_rows import stacked

        return stacked

    # -- around training --------------------------------------------------------------------------------------

    def before(self, tuned: Tuned, processor: Any, folder: Path) -> list[str]:
        """Says which prompts are cut; makes the prior's pictures, whose loss keeps what the untouched model knows."""
        from veneer.models.text_conditions import context
        from veneer.tasks.picture_samples import give_prior

        tokenizer, limit = context(processor.pipeline, self.options.max_length)
        prompts = [self.prompt(row) for _, table in self.splits.items() for row in table.rows]
        cut = sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False)["input_ids"])
        lines = [f"Pictures: {processor.size} pixels a side (--image-size); the network predicts: {processor.noising.target}"]
        if cut:
            lines.append(
                f"{cut} of {len(prompts)} prompts are longer than the {limit} tokens that the text encoder reads, and are cut there."
            )
        return [*lines, *([give_prior(tuned, self.own, folder)] if self.own.prior_prompt else [])]

    def after(self, tuned: Tuned, processor: Any, folder: Path) -> list[str]:
        """Pictures of the first test prompts by the untouched and the adapted model, and a contact sheet of them."""
        from veneer.tasks.picture_samples import write_samples

        given = [(self.prompt(row), row["image"]) for row in self.splits.test.rows]
        return [write_samples(tuned, self.own, given, folder)]

    # -- results ----------------------------------------------------------------------------------------------

    def measure(self, kept: np.ndarray, rows: Sequence[Row]) -> Measured:
        return Measured({"loss": bootstrap(lambda losses: float(losses.mean()), kept)})

    def predict(self, model: nn.Module, processor: Any, inputs: Sequence[Any], batch_size: int = 8) -> list[dict[str, Any]]:
        """Pictures of prompts: texts, or rows of data. The nth picture has seed n."""
        from veneer.models.sampling import sample

        prompts = [item if isinstance(item, str) else self.prompt(item) if isinstance(item, dict) else "" for item in inputs]
        if not all(prompt.strip() for prompt in prompts):
            raise BadValue("predict: give descriptions as texts, or rows with the columns that the run was trained on.")
        own, found = self.own, []
        for i in range(0, len(prompts), batch_size):
            found += sample(processor, prompts[i : i + batch_size], i, own.sample_steps, own.guidance)
        return [{"image": picture, "prompt": prompt, "seed": i} for i, (picture, prompt) in enumerate(zip(found, prompts))]
