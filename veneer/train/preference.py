"""Preference training with TRL's DPOTrainer, for any method: the reference is the policy with its adapters off, or another adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer.errors import MissingExtra, Unsupported
from veneer.maths.preference import advantage, answer_logp
from veneer.train.trainer import AdapterTrainerMixin
from veneer.tuned import Tuned

try:
    from trl import DPOTrainer
except ModuleNotFoundError as error:
    raise MissingExtra("Preference training needs trl: pip install 'veneer[trl]'") from error


class Reference(nn.Module):
    """The policy's own model with other adapters, or none, in place of a second copy.

    TRL calls it as it calls the policy, without gradients.
    """

    def __init__(self, tuned: Tuned, adapter: str | None = None) -> None:
        super().__init__()
        if adapter is not None:
            tuned._known(adapter)
        self.policy, self.names, self.tuned = tuned.model, () if adapter is None else (adapter,), tuned
        self.config: Any = tuned.model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.tuned.acting(*self.names):
            return self.policy(*args, **kwargs)

    @property
    def generation_config(self) -> Any:
        return self.policy.generation_config

    def get_output_embeddings(self) -> Any:
        return self.policy.get_output_embeddings()  # type: ignore[operator]


class PreferenceTrainer(AdapterTrainerMixin, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on a model with adapters; every loss and option of `trl.DPOConfig` holds.

    Args:
        model: with adapters attached (`veneer.attach`); the active one trains.
        reference: name of the adapter that the policy must not stray from; None: the base without adapters.
        own_loss: of the advantages h [pairs], in place of TRL's losses; gives the loss of every pair.
        args, train_dataset, …: as for `trl.DPOTrainer`.

    Raises:
        Unsupported: an adapter on the output layer, which TRL's fused loss goes around.
    """

    def __init__(
        self, model: Any, *, reference: str | None = None, own_loss: Callable[[Tensor], Tensor] | None = None, **kwargs: Any
    ) -> None:
        tuned = veneer.of(model)
        head = next((site.name for name in tuned.active for site in tuned.sites(name) if site.role == "head"), None)
        if head is not None:
            raise Unsupported(f"PreferenceTrainer: {head} is adapted, but TRL multiplies by the output layer's own weight; leave it out.")
        stand_in = Reference(tuned, reference)
        super().__init__(model=model, ref_model=stand_in, **kwargs)
        vars(stand_in).pop("forward", None)  # TRL has put its fused head on it; the policy has one, which is enough
        self.own_loss = own_loss

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        if self.own_loss is None:
            return super()._compute_loss(model, inputs, return_outputs)
        better, worse = self._logps(model, inputs).chunk(2)
        with torch.no_grad():
            if "ref_chosen_logps" in inputs:
                held = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                chosen, rejected = self._logps(self.ref_model, inputs).chunk(2)
                held = chosen, rejected
        h = advantage((better, worse), held)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["rewards/accuracies"].append(float((h > 0).float().mean()))
        loss = self.own_loss(h).mean()
        return (loss, None) if return_outputs else loss

    def _logps(self, model: Any, inputs: Any) -> Tensor:
        """Of every answer of a batch [2 · pairs], better ones first, through TRL's fused output layer."""
        mask = inputs["completion_mask"]
        own = {k: v for k, v in inputs.items() if k not in ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")}
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        return model(**own, labels=labels, fused_lm_head=True, use_cache=False).log_probs.sum(1)


def pair_logps(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of better and worse answers [pairs] each, of a batch that holds first all better, then all worse ones.

    `batch`: input_ids, attention_mask and labels [2 · pairs, length], labels -100 before the answer.
    """
    labels = batch["labels"]
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    aligned = bool(getattr(model.config, "is_encoder_decoder", False))
    if aligned:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    logits = model(**inputs, use_cache=False).logits
    better, worse = answer_logp(logits[:, -labels.shape[1] :], labels, aligned=aligned).chunk(2)
    return better, worse


@torch.no_grad()
def measure(tuned: Tuned, batches: Any, reference: str | None = None, beta: float = 0.1) -> dict[str, list[float]]:
    """h of every pair and the policy's and the reference's log-probabilities of its answers, for plots and intervals."""
    tuned.model.eval()
    found: dict[str, list[float]] = {"h": [], "reward_chosen": [], "reward_rejected": []}
    for batch in batches:
        policy = pair_logps(tuned.model, batch)
        with tuned.acting(*(() if reference is None else (reference,))):
            held = pair_logps(tuned.model, batch)
        found["h"] += advantage(policy, held).tolist()
        found["reward_chosen"] += (beta * (policy[0] - held[0])).tolist()
        found["reward_rejected"] += (beta * (policy[1] - held[1])).tolist()
    return found
