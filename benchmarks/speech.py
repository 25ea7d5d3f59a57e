"""Whisper tiny.en learns Spanish prompts by LoRA, AdaLoRA, S2-LoRA and BitFit at one budget; is its English kept? (arXiv:2309.11756)

    python benchmarks/speech.py [--out runs/speech] [--steps 40]

Each method is one run of recipes/whisper-spanish.yaml, at about as many trained numbers as Whisper has biases, which is all that
BitFit can train. Word and character error rates of the same test prompts, Spanish and English, with 95 % bootstrap intervals.
Interrupted or repeated, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from veneer.cli.output import plain
from veneer.train import Recipe, evaluate, train

RECIPE = Path(__file__).parents[1] / "recipes" / "whisper-spanish.yaml"
ENGLISH = "asterisk-en"
RUNS = {
    "lora(r=2)": 3e-3,
    "adalora(init_r=2, target_r=1, targets='attn.q attn.v cross.q cross.v')": 2e-2,
    "s2-lora(r=45)": 1e-2,
    "bitfit": 5e-3,
}
"""Method → learning rate."""


def cached(file: Path, make: Any) -> Any:
    """What `make` gives, as JSON; kept in a file."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(plain(make())))
    return json.loads(file.read_text())


def english_before(folder: Path) -> dict[str, Any]:
    """The untouched model on the English test prompts."""
    from veneer.train.use import measure, rebuild

    model, processor, task = rebuild(folder, adapter=False)
    from veneer.tasks.task import prepare

    task.splits = prepare(ENGLISH, "transcription", task.options)[0].splits
    return measure(model, processor, task, 16).metrics


def rate(metric: dict[str, Any]) -> str:
    return f"{100 * metric['value']:.1f} ({100 * metric['low']:.1f}–{100 * metric['high']:.1f})"


def row(name: str, trained: str, spanish: dict[str, Any], english: dict[str, Any], rest: str) -> str:
    return f"| {name} | {trained} | {rate(spanish['wer'])} | {rate(spanish['cer'])} | {rate(english['wer'])} | {rest} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/speech"))
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    lines = []
    for i, (method, lr) in enumerate(RUNS.items()):
        folder = given.out / method.partition("(")[0]
        changes = {"method": method, "lr": lr, "steps": given.steps, "eval_every": given.steps, "base": i == 0, "out": str(folder)}
        outcome = train(Recipe.read(RECIPE, changes))
        if i == 0:
            before = cached(given.out / "english.json", lambda folder=folder: english_before(folder))
            lines.append(row("untouched", "0", plain(outcome.base_metrics), before, "– | –"))
        english = cached(folder / "english.json", lambda folder=folder: evaluate(folder, ENGLISH))
        lines.append(row(f"`{method}`", f"{outcome.trained:,}", plain(outcome.metrics), english, f"{lr:g} | {outcome.seconds:.0f}"))
    print("\n| method | trained | Spanish WER, 95 % | Spanish CER | English WER | learning rate | seconds |")
    print("|---|---|---|---|---|---|---|\n" + "\n".join(lines))


if __name__ == "__main__":
    main()
