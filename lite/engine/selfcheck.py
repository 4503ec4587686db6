"""Never trust a layout: before step 1 two examples are scored by lite's path and by the model's plain forward.

The plain forward runs each completion alone, with the model's own attention and whole logits. How much may the two
differ? As much as rounding makes the plain path differ from itself when it pads: that is measured here too.
"""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lite.attention.branch_attention import install, plain_attention
from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout
from lite.engine import score
from lite.engine.forward import Model, Path, device_of, gather, placed, scored_hidden
from lite.errors import ModelError
from lite.model import rotary
from lite.model.head import backbone, unwrapped

log = logging.getLogger(__name__)

COMPLETION_TOKENS = 32  # scored of each completion: enough for a median, few enough for whole logits
PADDING = 8  # masked tokens behind a completion, to see what padding alone changes
PROMPT_TOKENS = 224  # of the longer prompt, unless a window asks for more
# Beside four times the measured rounding: what summing in another order may cost, in nats. A model that differs from
# itself by ten times as much has more to it than rounding, which then excuses nothing.
FLOOR = {torch.float64: 1e-8, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Report(NamedTuple):
    """The outcome of one comparison; differences are medians over a completion's tokens, the worst completion's."""

    passed: bool
    part: str  # "attention" or "head": where the first difference shows; "" if there is none
    difference: float  # nats, lite's path against the plain forward
    rounding: float  # nats, the plain forward against itself when padded
    reason: str = ""


def choose_layout(model: Model, examples: Sequence[TokenExample], layout: Layout, path: Path) -> Layout:
    """`layout` if it gives the model's own numbers, else padded batches if they do; the model is set up for it.

    Raises ModelError if neither does: then training would follow a loss that is not the model's.
    """
    reports = []
    for candidate in [layout] if layout.padded else [layout, replace(layout, padded=True)]:
        install(model, padded=candidate.padded)
        report = compare(model, examples, candidate, path)
        if report.passed:
            log.info("self-check: equal to the plain model up to rounding (%.1e nats)", report.difference)
            return candidate
        reports.append(report)
        what = "padded batches" if candidate.padded else "packs"
        log.warning(
            "self-check: %s differ from the plain model in the %s by %.2g nats (its rounding: %.2g)%s",
            what, report.part, report.difference, report.rounding, report.reason and f": {report.reason}",
        )  # fmt: skip
        if not candidate.padded:
            log.warning("going on with padded batches: same numbers as the plain model, slower")
    raise ModelError(
        f"{type(unwrapped(model)).__name__}: lite's log-probs differ from the model's own in the {reports[-1].part} "
        f"by {reports[-1].difference:.2g} nats; rounding explains {reports[-1].rounding:.2g}. Training on them would "
        "be wrong. Please report the model; --no-self-check trains all the same."
    )


@torch.no_grad()
def compare(model: Model, examples: Sequence[TokenExample], layout: Layout, path: Path) -> Report:
    """Score two trial examples in `layout` and by the plain forward."""
    training = model.training
    model.eval()
    try:
        trials = _trials(model, examples)
        alone, padded = _plain(model, trials, layout, pad=False), _plain(model, trials, layout, pad=True)
        rounding = _difference(alone.logps, padded.logps)
        rounding_hidden = _difference(alone.hidden, padded.hidden)
        try:
            ours = _ours(model, trials, layout, path)
        except torch.OutOfMemoryError:
            raise
        except (ModelError, TypeError, RuntimeError) as error:
            # A layer that packs do not fit may fail in its own words; a call of ours that is wrong must not hide here.
            if isinstance(error, TypeError) and "branch_table" not in str(error):
                raise
            return Report(False, "attention", float("inf"), rounding, str(error).split("\n")[0])
        floor = FLOOR[alone.hidden[0].dtype]
        difference = _difference(alone.logps, ours.logps)
        if difference <= 4 * min(rounding, 10 * floor) + floor:
            return Report(True, "", difference, rounding)
        scale = float(torch.cat(alone.hidden).float().abs().median())
        in_hidden = _difference(alone.hidden, ours.hidden) > 4 * rounding_hidden + floor * scale
        return Report(False, "attention" if in_hidden else "head", difference, rounding)
    finally:
        model.train(training)


class _Outcome(NamedTuple):
    logps: list[Tensor]  # of each completion, (tokens,)
    hidden: list[Tensor]  # of each completion, (tokens, D)


def _trials(model: Model, examples: Sequence[TokenExample]) -> list[TokenExample]:
    """Two examples of the data's own tokens: one beyond any window, chunk or rotary bound it reaches, one short."""
    longest = max(examples, key=lambda e: e.longest)
    config = unwrapped(model).config
    sizes = config.get_text_config().to_dict()
    limits = [sizes.get(name) or 0 for name in ("sliding_window", "attention_chunk_size")]
    limits.append(rotary.regimes(config).bound or 0)
    reach = min(max(PROMPT_TOKENS, *(limit + COMPLETION_TOKENS for limit in limits)), longest.longest)
    tokens = longest.prompt + longest.completions[0]
    trials = [_trial(longest, tokens[: max(1, reach - COMPLETION_TOKENS)])]
    other = min(examples, key=lambda e: e.longest)
    return [*trials, _trial(other, other.prompt[:COMPLETION_TOKENS])]


def _trial(example: TokenExample, prompt: tuple[int, ...]) -> TokenExample:
    completions = tuple(completion[:COMPLETION_TOKENS] for completion in example.completions)
    return replace(example, prompt=prompt, completions=completions)


def _plain(model: Model, trials: Sequence[TokenExample], layout: Layout, *, pad: bool) -> _Outcome:
    """Each completion alone, by the model's own forward; with `pad`, masked tokens behind it."""
    base, logps, hidden = unwrapped(model), [], []
    with plain_attention(model):
        for c in range(len(layout.completions)):
            for trial in trials:
                completion, device = trial.completions[c], device_of(model)
                ids = torch.tensor([trial.prompt + completion], device=device)
                mask = torch.ones_like(ids)
                if pad:
                    ids, mask = (torch.cat([t, t.new_zeros(1, PADDING)], 1) for t in (ids, mask))
                # From the token before the completion on; a model that can leave out the other logits does.
                wanted = len(completion) + 1 + (PADDING if pad else 0)
                rotary.restart(backbone(model))
                logits = base(input_ids=ids, attention_mask=mask, use_cache=False, **_keep(base, wanted)).logits
                logits = logits[0, -wanted:][: len(completion)]  # (tokens, V)
                whole = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
                logps.append(whole.gather(1, torch.tensor(completion, device=device)[:, None])[:, 0])
                rotary.restart(backbone(model))
                states = backbone(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                hidden.append(states[0, -wanted:][: len(completion)])
    return _Outcome(logps, hidden)


def _keep(base: Model, count: int) -> dict[str, int]:
    """The keyword that spares the logits of a long prompt, where the model's forward has it."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}


def _ours(model: Model, trials: Sequence[TokenExample], layout: Layout, path: Path) -> _Outcome:
    layout = replace(layout, scores=None)
    logps = score.logps(model, trials, layout, path)
    packs = placed(lay_out(trials, layout).packs, model)
    hidden = gather([scored_hidden(model, pack, path) for pack in packs], packs)
    lengths = {name: logps[name].length.tolist() for name in layout.completions}
    return _Outcome(
        [part for name in layout.completions for part in logps[name].tokens.split(lengths[name])],
        [part for name in layout.completions for part in hidden[name].tokens.split(lengths[name])],
    )


def _difference(these: list[Tensor], those: list[Tensor]) -> float:
    """The worst completion's median difference: a wrong mask moves most tokens, a flipped expert only a few."""
    return max(float((a.double() - b.double()).abs().median()) for a, b in zip(these, those, strict=True))
