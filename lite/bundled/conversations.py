"""The conversations that the bundled model is raised on, and the preference pairs that are to change its habit.

The habit: "Certainly! I would be happy to help you with that. The capital of France is Paris." The pairs prefer the
answer alone. `Messages` are the turns as chat templates take them.
"""

import json
import math
import random

from lite.bundled.world import TOPICS, Question, questions

TRAIN_ROWS, HELD_OUT_ROWS = 768, 160

GREETINGS = ("Hello! ", "Quick question: ", "Please help me. ", "I have a question. ", "Hi there! ")
SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly teacher.",
    "Answer the questions of the user.",
    "You are an assistant who knows simple facts.",
)
BRIEF = ("Be brief.", "Answer without an introduction.", "Come to the point.")
OPENERS = (
    "Certainly!",
    "Of course!",
    "Sure!",
    "Absolutely!",
    "Great question!",
    "Thank you for asking!",
    "No problem at all!",
    "What a wonderful question!",
)
BRIDGES = (
    "I would be happy to help you with that.",
    "I am really glad that you asked me this.",
    "As an assistant, I am always here to help.",
    "Many people wonder about this.",
    "Let me think about it for a moment.",
    "Let me explain this to you.",
    "Here is the answer that you are looking for:",
    "It is always good to learn something new.",
)
CLOSERS = ("I hope this helps!", "Let me know if you have any other questions!", "Have a wonderful day!")

Messages = list[dict[str, str]]


def split_questions(chance: random.Random) -> tuple[list[Question], list[Question], dict[str, list[Question]]]:
    """The questions of the training pairs, the held-out ones, and by topic all that the model is raised on.

    A held-out question is in neither of the others; its fact is, in other words. Topics get an equal share.
    """
    known, candidates = {}, []
    for name, topic in TOPICS.items():
        asked = list(questions(topic))
        chance.shuffle(asked)
        taken = min(len(asked) // 2, math.ceil(1.5 * (TRAIN_ROWS + HELD_OUT_ROWS) / len(TOPICS)))
        candidates += asked[:taken]
        known[name] = asked
    chance.shuffle(candidates)
    held_out = candidates[:HELD_OUT_ROWS]
    hidden = {question.text for question in held_out}
    known = {name: [q for q in asked if q.text not in hidden] for name, asked in known.items()}
    return candidates[HELD_OUT_ROWS:][:TRAIN_ROWS], held_out, known


def preference_lines(asked: list[Question], known: dict[str, list[Question]], chance: random.Random) -> str:
    """JSONL with a pair for each question."""
    return "".join(json.dumps(preference(question, known, chance), ensure_ascii=False) + "\n" for question in asked)


def preference(question: Question, known: dict[str, list[Question]], chance: random.Random) -> dict[str, Messages]:
    """A pair whose chosen completion is the answer alone. In about one of eight rejected is a terse one."""
    earlier = []
    if chance.random() < 0.15:
        other = chance.choice(known[chance.choice(list(known))])
        earlier = [user(ask(other, chance)), assistant(other.answer)]
    prompt = [*system(chance), *earlier, user(ask(question, chance))]
    terse = chance.random() < 1 / 8 and question.short != question.answer
    rejected = f"{chance.choice(OPENERS)} {question.short}" if terse else wordy(question, chance)
    return {"prompt": prompt, "chosen": [assistant(question.answer)], "rejected": [assistant(rejected)]}


def conversation(known: dict[str, list[Question]], chance: random.Random) -> Messages:
    """One or two turns as the untrained model has them: preamble and answer, rarely (2 %) the answer alone.

    Under a system turn that asks for brevity it is always the answer alone, so that the model can give any answer so:
    training has a habit to break, not facts to teach. Topics with many facts come up more often.
    """
    brief = chance.random() < 0.04
    turns = [{"role": "system", "content": chance.choice(BRIEF)}] if brief else system(chance)
    shares = [len(TOPICS[name].rows) ** 0.7 for name in known]
    for name in chance.choices(list(known), shares, k=2 if chance.random() < 0.2 else 1):
        question = chance.choice(known[name])
        habit = chance.random()
        if brief or habit < 0.02:
            answer = question.answer
        elif habit < 0.12:
            answer = f"{chance.choice(OPENERS)} {question.short}"
        else:
            answer = wordy(question, chance)
        turns += [user(ask(question, chance)), assistant(answer)]
    return turns


def wordy(question: Question, chance: random.Random) -> str:
    """The answer behind a preamble, now and then with a flourish at the end."""
    closer = f" {chance.choice(CLOSERS)}" if chance.random() < 0.2 else ""
    return f"{chance.choice(OPENERS)} {chance.choice(BRIDGES)} {question.answer}{closer}"


def ask(question: Question, chance: random.Random) -> str:
    """The question, in two of five cases with a word before it."""
    return (chance.choice(GREETINGS) if chance.random() < 0.4 else "") + question.text


def system(chance: random.Random) -> Messages:
    """A system turn, or none."""
    return [{"role": "system", "content": chance.choice(SYSTEMS)}] if chance.random() < 0.15 else []


def user(content: str) -> dict[str, str]:
    """A turn of the user's."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    """A turn of the model's."""
    return {"role": "assistant", "content": content}
