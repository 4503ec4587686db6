"""Samples: what the model answers to a few held-out prompts, before and after training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lite.attention.branch_attention import plain_attention
from lite.data.examples import Example, Text, TokenExample
from lite.data.prepare import Prepared
from lite.train.run import write_json

ANSWER_TOKENS = 64
SAMPLES = "samples.json"


@dataclass(frozen=True)
class Sample:
    """A held-out prompt and the model's most likely answer."""

    place: str  # of the row: pairs.jsonl:17
    prompt: str
    answer: str


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Prepared, count: int) -> list[Sample]:
    """Greedy answers of at most 64 tokens to the first `count` held-out prompts."""
    examples = {example.place: example for example in data.held_out_examples}
    model.eval()
    samples = []
    with plain_attention(model), torch.inference_mode():
        for tokens in data.held_out[:count]:
            answer = _greedy(model, tokens, data.stop_ids)
            text = tokenizer.decode(answer, skip_special_tokens=True).strip()
            samples.append(Sample(str(tokens.place), _shown(examples[tokens.place], tokens, tokenizer), text))
    return samples


def save(folder: Path, when: str, samples: Sequence[Sample]) -> None:
    """Write the answers into the run's samples.json, beside those of the other time."""
    path = folder / SAMPLES
    rows = {row["place"]: row for row in json.loads(path.read_text(encoding="utf-8"))} if path.exists() else {}
    for sample in samples:
        rows.setdefault(sample.place, {"place": sample.place, "prompt": sample.prompt})[when] = sample.answer
    write_json(path, list(rows.values()))


def _greedy(model: PreTrainedModel, example: TokenExample, stop_ids: Sequence[int]) -> list[int]:
    # Every field that the model's own generation config may set otherwise is named, or this would not be greedy.
    how = GenerationConfig(
        max_new_tokens=ANSWER_TOKENS,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
    )
    ids = torch.tensor([example.prompt], device=model.device)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return out[0, ids.shape[1] :].tolist()


def _shown(example: Example, tokens: TokenExample, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt as a reader knows it: the last turn of a conversation, else the text."""
    prompt: Text = example.prompt
    if isinstance(prompt, str):
        return prompt
    last = prompt[-1]["content"] if prompt else ""
    return last if isinstance(last, str) and last else tokenizer.decode(tokens.prompt)
