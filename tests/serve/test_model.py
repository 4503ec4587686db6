"""A model speaks as transformers' own generation does; with its adapter off it is its base."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lite.errors import ModelError
from lite.model.catalog import BUNDLED_MODEL
from lite.serve import file
from lite.serve.conversation import Sampling
from lite.serve.model import BASE, TUNED, ModelSpeaker, speaking
from tests import served

GREEDY = Sampling(max_tokens=40, temperature=0)
TURNS = [{"role": "user", "content": served.QUESTION}]
MACHINE = {"device": "cpu", "dtype": "float32"}


def _generated(model: torch.nn.Module) -> str:
    ids = torch.tensor([served.prompt()])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    return served.tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_base_and_tuned_speak_in_turn_as_each_would_alone() -> None:
    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(str(BUNDLED_MODEL), dtype=torch.float32).eval()
    expected = {BASE: _generated(plain)}
    expected[TUNED] = _generated(PeftModel.from_pretrained(plain, str(served.adapter())).eval())
    assert expected[BASE] != expected[TUNED]
    with speaking(str(served.adapter()), compare=True, machine=MACHINE) as speakers:
        assert [speaker.name for speaker in speakers] == [BASE, TUNED]
        found = dict.fromkeys(expected, "")
        answers = {speaker.name: speaker.answer(TURNS, GREEDY) for speaker in speakers}
        while answers:  # a piece of each in turn, as the terminal shows them
            for name in list(answers):
                piece = next(answers[name], None)
                if piece is None:
                    del answers[name]
                else:
                    found[name] += piece
        assert found == expected


def test_pieces_are_whole_characters_and_the_seed_decides() -> None:
    with speaking(str(BUNDLED_MODEL), machine=MACHINE) as (speaker,):
        assert speaker.tokens(TURNS) == len(served.prompt())
        pieces = list(_said(speaker, "Größe 你好 🦙"))
        assert "".join(pieces) == "Größe 你好 🦙"
        assert not any("\ufffd" in piece for piece in pieces)
        wild = [
            "".join(speaker.answer(TURNS, Sampling(max_tokens=12, temperature=3.0, top_p=1.0, seed=seed)))
            for seed in (1, 1, 2)
        ]
        assert wild[0] == wild[1] != wild[2]
        narrow = Sampling(max_tokens=40, temperature=1.0, top_p=1e-6, seed=3)  # leaves the likeliest alone
        assert "".join(speaker.answer(TURNS, narrow)) == "".join(speaker.answer(TURNS, GREEDY))


def _said(speaker: ModelSpeaker, text: str):
    from lite.serve.model import text_of

    return text_of(speaker.tokenizer, iter(speaker.tokenizer(text)["input_ids"]))


def test_without_a_template_model_and_file_go_on_from_plain_text() -> None:
    """The prompt is what was said, text after text, as training with chat_template none has prompt and completion."""
    model, path = served.plain()
    turns = [{"role": "system", "content": "Be kind. "}, *TURNS, {"role": "assistant", "content": " Paris"}]
    turns.append({"role": "user", "content": ".\nThe capital of"})
    ids = served.tokenizer()(f"Be kind. {served.QUESTION} Paris.\nThe capital of")["input_ids"]
    with speaking(str(model), machine=MACHINE) as (whole,), file.speaking(path, context=256) as other:
        assert whole.plain
        assert other.plain
        assert whole.tokens(turns) == other.tokens(turns) == len(ids)
        said = "".join(other.answer(turns, GREEDY))
        assert said == "".join(whole.answer(turns, GREEDY)) != ""
        asked = torch.tensor([ids])
        how = {"attention_mask": torch.ones_like(asked), "max_new_tokens": 40, "do_sample": False}
        out = whole.model.generate(input_ids=asked, **how)
        assert said == served.tokenizer().decode(out[0, len(ids) :], skip_special_tokens=True)
    with speaking(str(BUNDLED_MODEL), machine=MACHINE) as (speaker,):
        assert not speaker.plain


def test_there_must_be_something_to_compare_with() -> None:
    with pytest.raises(ModelError, match="has no adapter to switch off"), speaking(str(BUNDLED_MODEL), compare=True):
        pass
