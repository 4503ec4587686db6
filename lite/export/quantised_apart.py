"""The process in which GPTQModel works: `python -m lite.export.quantised_apart JOB RESULT`.

Apart, because the library changes transformers where it stands, talks to stdout, and gives its memory back when it
ends. JOB is a JSON file: `settings` of QuantizeConfig, `merged` (folder of the model), `out` (folder to write into),
`calibration` (token ids of each row), `held_out` (prompt, completions and label of each row to score). RESULT gets
log p of every token of every completion, nats: of the `merged` model and of the `quantised` one as it was written.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def quantise(job: dict[str, Any]) -> dict[str, list[list[list[float]]]]:
    """Quantise and score as the job says."""
    GPTQModel, QuantizeConfig = _library()  # first: without it there is nothing to wait for
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, found = job["held_out"], {}
    if rows:
        model = AutoModelForCausalLM.from_pretrained(job["merged"], dtype="auto", device_map=device).eval()
        found["merged"] = said(model, rows)
        del model
    model = GPTQModel.load(job["merged"], QuantizeConfig(**job["settings"], device=device))
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["calibration"]], batch_size=1)
    model.save(job["out"])
    del model
    if rows:
        found["quantised"] = said(GPTQModel.load(job["out"], device=device).model.eval(), rows)
    return found


def said(model: Any, rows: Sequence[Any]) -> list[list[list[float]]]:
    """Log p of every token of every row's completions, nats, by the model's plain forward."""
    import torch

    device = next(model.parameters()).device
    found = []
    for prompt, completions, _ in rows:
        found.append([])
        for completion in completions:
            ids = torch.tensor([[*prompt, *completion]], device=device)
            with torch.no_grad():
                logits = model(input_ids=ids, logits_to_keep=len(completion) + 1).logits[0, :-1].float()  # (N, V)
            labels = ids[0, len(prompt) :, None]  # (N, 1)
            found[-1].append(logits.log_softmax(-1).gather(-1, labels)[:, 0].tolist())
    return found


def _library() -> tuple[Any, Any]:
    from gptqmodel import GPTQModel, QuantizeConfig

    return GPTQModel, QuantizeConfig


if __name__ == "__main__":
    _job, _result = map(Path, sys.argv[1:])
    _result.write_text(json.dumps(quantise(json.loads(_job.read_text(encoding="utf-8")))), encoding="utf-8")
