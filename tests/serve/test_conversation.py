"""A conversation remembers what fits, and what was said until it was stopped."""

from collections.abc import Iterator

import pytest

from lite.errors import ModelError
from lite.serve.chat import COMMANDS, Chat
from lite.serve.conversation import Conversation, Sampling
from lite.serve.file import FileSpeaker, is_gguf, speaking
from tests import served

GREEDY = Sampling(max_tokens=48, temperature=0)


@pytest.fixture(scope="module")
def speaker() -> Iterator[FileSpeaker]:
    with speaking(served.gguf(), context=128) as opened:
        yield opened


def test_what_was_said_is_part_of_the_next_prompt(speaker: FileSpeaker) -> None:
    talk = Conversation(speaker, "Be kind.")
    first = "".join(talk.ask(served.QUESTION, GREEDY))
    second = "".join(talk.ask("And of Italy?", GREEDY))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": served.QUESTION}]
    assert first == "".join(speaker.answer(turns, GREEDY))
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And of Italy?"}]
    assert second == "".join(speaker.answer(turns, GREEDY))
    talk.reset()
    assert "".join(talk.ask(served.QUESTION, GREEDY)) == first


def test_a_stopped_answer_is_remembered_as_far_as_it_came(speaker: FileSpeaker) -> None:
    talk = Conversation(speaker)
    answer = talk.ask(served.QUESTION, GREEDY)
    begun = next(answer) + next(answer)
    answer.close()
    went_on = "".join(talk.ask("Go on", GREEDY))
    turns = [{"role": "user", "content": served.QUESTION}, {"role": "assistant", "content": begun}]
    assert went_on == "".join(speaker.answer([*turns, {"role": "user", "content": "Go on"}], GREEDY))


def test_the_oldest_exchanges_make_room(speaker: FileSpeaker) -> None:
    """In a context of 128 tokens three exchanges with 48 free do not fit, and a text of 300 words never does."""
    talk = Conversation(speaker)
    for number in range(4):
        assert "".join(talk.ask(f"What is {number} and {number}?", GREEDY))
    assert talk.forgotten > 0
    with pytest.raises(ModelError, match=r"bundled-q8_0: \d+ tokens are too many: with 48 .* its context is 128"):
        next(talk.ask("word " * 300, GREEDY))


def test_commands(speaker: FileSpeaker) -> None:
    chat = Chat([speaker, speaker], GREEDY)
    assert chat.command("hello") is None
    assert all(word.split()[0] in chat.command("/help").text for word in COMMANDS)
    assert chat.command("/exit").over
    assert (
        chat.command("/rest").text
        == "/rest: no such command. Did you mean /reset? There are "
        + ", ".join(word.split()[0] for word in COMMANDS)
        + "."
    )
    answers = ["", ""]
    for number, piece in chat.ask(served.QUESTION):
        answers[number] += piece
    assert answers[0] == answers[1] != ""
    chat.command("/system  Be brief. ")
    assert [talk.system for talk in chat.conversations] == ["Be brief.", "Be brief."]
    chat.command("/system")
    assert chat.conversations[0].system is None


def test_seed_and_temperature_decide(speaker: FileSpeaker) -> None:
    turns = [{"role": "user", "content": "Tell me a story"}]
    said = [
        "".join(speaker.answer(turns, Sampling(max_tokens=24, temperature=temperature, top_p=1, seed=seed)))
        for temperature, seed in ((2.0, 1), (2.0, 1), (2.0, 2), (0, 1))
    ]
    assert said[0] == said[1] != said[2]
    assert said[3] not in said[:3]


def test_a_gguf_is_known_by_its_first_bytes(tmp_path) -> None:
    named = tmp_path / "model.gguf"
    named.write_bytes(b"no")
    assert not is_gguf(named)
    assert not is_gguf(tmp_path)
    assert is_gguf(served.gguf())
