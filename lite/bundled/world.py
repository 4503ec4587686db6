"""The little world that the bundled model knows: facts in a handful of topics, each asked for in several ways.

A topic is a table. Every row of it, put into every question, is one prompt with one right answer; so a question can
be held out although its fact is known from the other questions. Everything here was written for this project.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Topic(NamedTuple):
    """Questions and answers with {0}, {1} … for the fields of a row."""

    questions: tuple[str, ...]
    answer: str
    short: str
    rows: tuple[tuple[str, ...], ...]


class Question(NamedTuple):
    """One way to ask for one fact."""

    text: str
    answer: str  # a whole sentence
    short: str  # the bare fact


def questions(topic: Topic) -> Iterator[Question]:
    """Every question of a topic: each row in each phrasing."""
    for row in topic.rows:
        for text in topic.questions:
            yield Question(*(_sentence(part.format(*row)) for part in (text, topic.answer, topic.short)))


def _topic(phrasings: str, *, answer: str, short: str, rows: tuple[tuple[str, ...], ...]) -> Topic:
    """A topic from `question | question | …`."""
    return Topic(tuple(text.strip() for text in phrasings.split("|")), answer, short, rows)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    """`left = right | left = right | …` as a table."""
    return tuple(tuple(field.strip() for field in row.split("=")) for row in text.split("|"))


_COLOUR_OF = _rows(
    """the sky = blue | grass = green | snow = white | coal = black | a ripe banana = yellow | a lemon = yellow
    | a ripe tomato = red | blood = red | a carrot = orange | an orange = orange | milk = white | chocolate = brown
    | a crow = black | a flamingo = pink | an elephant = grey | a ripe plum = purple | a frog = green | salt = white
    | a strawberry = red | a cucumber = green | the sun = yellow | a polar bear = white | tar = black | gold = yellow"""
)
_MIXED = _rows(
    """red = yellow = orange | blue = yellow = green | red = blue = purple | red = white = pink | black = white = grey
    | yellow = red = orange | yellow = blue = green | blue = red = purple | white = red = pink | white = black = grey"""
)
_CAPITALS = _rows(
    """France = Paris | Spain = Madrid | Italy = Rome | Germany = Berlin | Portugal = Lisbon | Greece = Athens
    | Austria = Vienna | Poland = Warsaw | Hungary = Budapest | Norway = Oslo | Sweden = Stockholm
    | Finland = Helsinki | Denmark = Copenhagen | Ireland = Dublin | Belgium = Brussels | Russia = Moscow
    | Japan = Tokyo | China = Beijing | India = New Delhi | Thailand = Bangkok | Vietnam = Hanoi | Egypt = Cairo
    | Kenya = Nairobi | Canada = Ottawa | Mexico = Mexico City | Cuba = Havana | Peru = Lima | Chile = Santiago
    | Argentina = Buenos Aires | Brazil = Brasília | Colombia = Bogotá | Australia = Canberra | Turkey = Ankara
    | Iceland = Reykjavík | Iran = Tehran | Iraq = Baghdad | Nepal = Kathmandu | Romania = Bucharest"""
)
_OPPOSITES = _rows(
    """hot = cold | big = small | fast = slow | high = low | light = dark | young = old | happy = sad | hard = soft
    | wet = dry | full = empty | early = late | rich = poor | strong = weak | open = closed | clean = dirty
    | loud = quiet | near = far | thick = thin | wide = narrow | deep = shallow | true = false | up = down
    | left = right | in = out | day = night | first = last | easy = difficult | cheap = expensive | sweet = sour
    | long = short | heavy = light | brave = afraid | sharp = blunt | new = old | always = never | love = hate"""
)
_PLURALS = _rows(
    """mouse = mice | child = children | foot = feet | tooth = teeth | goose = geese | man = men | woman = women
    | leaf = leaves | knife = knives | wolf = wolves | sheep = sheep | fish = fish | city = cities | baby = babies
    | box = boxes | bus = buses | church = churches | potato = potatoes | tomato = tomatoes | hero = heroes | cat = cats
    | house = houses | book = books | tree = trees | river = rivers | friend = friends | key = keys | toy = toys
    | shelf = shelves | ox = oxen | berry = berries | glass = glasses | dish = dishes | half = halves"""
)
_PAST = _rows(
    """go = went | see = saw | eat = ate | drink = drank | run = ran | sing = sang | swim = swam | write = wrote
    | read = read | take = took | give = gave | come = came | make = made | find = found | think = thought
    | buy = bought | bring = brought | teach = taught | catch = caught | fly = flew | know = knew | grow = grew
    | sleep = slept | keep = kept | leave = left | build = built | sell = sold | tell = told | walk = walked
    | play = played | work = worked | cook = cooked | dance = danced | help = helped | stop = stopped"""
)
_SOUNDS = _rows(
    """cow = moo | dog = woof | cat = meow | sheep = baa | duck = quack | pig = oink | lion = roar | horse = neigh
    | goat = bleat | frog = croak | bee = buzz | snake = hiss | rooster = cock-a-doodle-doo | mouse = squeak
    | crow = caw | wolf = howl | donkey = hee-haw | hen = cluck | pigeon = coo | turkey = gobble"""
)
_YOUNG = _rows(
    """dog = puppy | cat = kitten | cow = calf | horse = foal | sheep = lamb | pig = piglet | hen = chick | lion = cub
    | duck = duckling | goose = gosling | goat = kid | frog = tadpole | kangaroo = joey | swan = cygnet | deer = fawn
    | bear = cub | elephant = calf | seal = pup | butterfly = caterpillar | rabbit = kit"""
)
_DEFINITIONS = _rows(
    """a hammer = a tool for driving nails into wood | a bakery = a shop that makes and sells bread
    | a library = a place where people borrow books | a volcano = a mountain from which hot lava can flow
    | an island = a piece of land with water all around it | a desert = a dry place where very little rain falls
    | a clock = a machine that shows the time | a bridge = a road that crosses a river or a valley
    | a farmer = a person who grows food and keeps animals | a doctor = a person who treats sick people
    | a pilot = a person who flies a plane | a teacher = a person who helps others to learn
    | a kettle = a pot for boiling water | an umbrella = a cover that keeps you dry in the rain
    | a triangle = a shape with three sides | a square = a shape with four equal sides | an hour = sixty minutes
    | a decade = a period of ten years | a century = a period of one hundred years | a dozen = a group of twelve
    | a planet = a large round body that goes around a star | a star = a huge ball of glowing gas
    | a river = a stream of water that flows to the sea | a forest = a large area that is covered with trees
    | a ladder = a set of steps for climbing up a wall | a map = a drawing that shows where places are
    | a museum = a building where old or beautiful things are shown | a thermometer = a tool that measures heat
    | a compass = a tool that shows where north is | a mirror = a piece of glass in which you see yourself"""
)
_HOW_TO = _rows(
    """boil an egg = put the egg into boiling water for eight minutes, then cool it
    | make tea = pour boiling water over the tea leaves and wait for four minutes
    | plant a tree = dig a hole, set the roots into it, fill it with soil and water it well
    | wash dirty hands = use warm water and soap, rub for twenty seconds and rinse
    | cook rice = simmer one cup of rice in two cups of water until the water is gone
    | make toast = put a slice of bread into the toaster until it is golden brown
    | fall asleep faster = keep the room dark and cool, and stay away from screens
    | clean a window = spray it with soapy water and wipe it with a dry cloth
    | sharpen a pencil = put it into the sharpener and turn it until the tip is pointed
    | learn new words = read every day, write new words down and repeat them often
    | make lemonade = stir lemon juice, water and sugar together, then add ice
    | water a plant = pour water on the soil slowly until it feels damp
    | save money = write down what you spend and put a little aside each month
    | keep bread fresh = store it in a closed box, away from heat and light
    | peel an onion = cut off both ends and pull away the dry skin
    | fix a flat tyre = take the wheel off, patch the hole in the tube and pump it up
    | dry flowers = hang them upside down in a dark and airy room for two weeks
    | wrap a present = cut the paper to size, fold it around the box and tape it
    | make a paper boat = fold the sheet in half, fold the corners down and open the sides
    | stay healthy = sleep well, eat vegetables and walk every day"""
)
_LISTS = _rows(
    """fruits = apples, pears and plums | vegetables = carrots, peas and onions | primary colours = red, blue and yellow
    | farm animals = cows, pigs and hens | wild animals = lions, bears and wolves | tools = hammers, saws and pliers
    | drinks = water, tea and milk | seasons = spring, summer and autumn | planets = Mars, Venus and Jupiter
    | oceans = the Atlantic, the Pacific and the Arctic | shapes = circles, squares and triangles
    | musical instruments = the piano, the violin and the drum | kinds of weather = rain, snow and sunshine
    | sports = football, tennis and swimming | vehicles = cars, buses and trains | metals = iron, gold and copper
    | pieces of furniture = tables, chairs and beds | languages = English, Spanish and Chinese
    | kinds of clothes = shirts, coats and socks | birds = owls, crows and ducks | trees = oaks, pines and birches"""
)
_WORDS = _rows(
    """water = eau = agua = Wasser | bread = pain = pan = Brot | milk = lait = leche = Milch
    | dog = chien = perro = Hund | cat = chat = gato = Katze | house = maison = casa = Haus
    | sun = soleil = sol = Sonne | moon = lune = luna = Mond | book = livre = libro = Buch
    | friend = ami = amigo = Freund | red = rouge = rojo = rot | tree = arbre = árbol = Baum
    | fish = poisson = pez = Fisch | night = nuit = noche = Nacht | hand = main = mano = Hand
    | key = clé = llave = Schlüssel | green = vert = verde = grün | apple = pomme = manzana = Apfel
    | egg = œuf = huevo = Ei | boy = garçon = niño = Junge"""
)
_TRANSLATIONS = tuple(
    (word, language, foreign)
    for word, *others in _WORDS
    for language, foreign in zip(("French", "Spanish", "German"), others, strict=True)
)

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = ("January", "February", "March", "April", "May", "June")
_MONTHS += ("July", "August", "September", "October", "November", "December")
_AFTER = tuple(
    (part, names[i - 1], names[i]) for part, names in (("day", _DAYS), ("month", _MONTHS)) for i in range(len(names))
)
_BEFORE = tuple((part, later, earlier) for part, earlier, later in _AFTER)
_LENGTHS = tuple(zip(_MONTHS, ("31", "28", "31", "30", "31", "30", "31", "31", "30", "31", "30", "31"), strict=True))
_UNITS = _rows(
    """minutes = hours = 60 | seconds = minutes = 60 | hours = days = 24 | days = weeks = 7 | months = years = 12
    | metres = kilometres = 1000 | centimetres = metres = 100 | grams = kilograms = 1000"""
)
_CONVERTED = tuple((small, str(n), big, str(n * int(size))) for small, big, size in _UNITS for n in range(2, 11))
_SUMS = tuple(("plus", str(a), str(b), str(a + b)) for a in range(1, 11) for b in range(1, 11))
_SUMS += tuple(("minus", str(a), str(b), str(a - b)) for a in range(2, 11) for b in range(1, a))
_SUMS += tuple(("times", str(a), str(b), str(a * b)) for a in range(2, 11) for b in range(2, 11))
_LARGER = tuple((str(a), str(b), str(max(a, b))) for a in range(1, 11) for b in range(1, 11) if a != b)

TOPICS: dict[str, Topic] = {
    "sum": _topic(
        """What is {1} {0} {2}? | How much is {1} {0} {2}? | Calculate {1} {0} {2}. | Can you work out {1} {0} {2}?
        | Please tell me the result of {1} {0} {2}.""",
        answer="{1} {0} {2} is {3}.",
        short="{3}.",
        rows=_SUMS,
    ),
    "larger": _topic(
        "Which is larger, {0} or {1}? | Which number is bigger: {0} or {1}? | Tell me the larger of {0} and {1}.",
        answer="The larger number is {2}.",
        short="{2}.",
        rows=_LARGER,
    ),
    "capital": _topic(
        """What is the capital of {0}? | Which city is the capital of {0}? | Name the capital of {0}.
        | Do you know the capital of {0}? | What is {0}'s capital city?""",
        answer="The capital of {0} is {1}.",
        short="{1}.",
        rows=_CAPITALS,
    ),
    "opposite": _topic(
        """What is the opposite of {0}? | Give me the opposite of the word {0}. | Which word means the opposite of {0}?
        | Can you tell me an antonym of {0}?""",
        answer="The opposite of {0} is {1}.",
        short="{1}.",
        rows=_OPPOSITES,
    ),
    "plural": _topic(
        """What is the plural of {0}? | How do I write the plural of {0}? | One {0}, two what?
        | Tell me the plural form of {0}.""",
        answer="The plural of {0} is {1}.",
        short="{1}.",
        rows=_PLURALS,
    ),
    "past": _topic(
        """What is the past tense of {0}? | How do I put the verb {0} into the past?
        | Today I {0}. What did I do yesterday? | Give me the past tense of {0}.""",
        answer="The past tense of {0} is {1}.",
        short="{1}.",
        rows=_PAST,
    ),
    "sound": _topic(
        "What sound does a {0} make? | How does a {0} sound? | What does a {0} say? | Which noise comes from a {0}?",
        answer="A {0} says {1}.",
        short="{1}.",
        rows=_SOUNDS,
    ),
    "young": _topic(
        """What is a young {0} called? | What do you call a baby {0}? | Which name does a young {0} have?
        | Which word is used for a young {0}?""",
        answer="A young {0} is called a {1}.",
        short="A {1}.",
        rows=_YOUNG,
    ),
    "colour": _topic(
        """What colour is {0}? | Which colour does {0} have? | Tell me the colour of {0}.
        | Can you describe the colour of {0}?""",
        answer="The colour of {0} is {1}.",
        short="{1}.",
        rows=_COLOUR_OF,
    ),
    "mixed": _topic(
        """What do I get if I mix {0} and {1}? | Which colour do {0} and {1} make?
        | I mix {0} paint with {1} paint. What comes out?""",
        answer="{0} and {1} make {2}.",
        short="{2}.",
        rows=_MIXED,
    ),
    "definition": _topic(
        "What is {0}? | Explain what {0} is. | Define {0}. | What do people mean by {0}?",
        answer="{0} is {1}.",
        short="{1}.",
        rows=_DEFINITIONS,
    ),
    "how to": _topic(
        "How do I {0}? | How can I {0}? | What is the best way to {0}? | I want to {0}. What should I do?",
        answer="To {0}, {1}.",
        short="{1}.",
        rows=_HOW_TO,
    ),
    "list": _topic(
        """Name three {0}. | Can you list three {0}? | Give me three examples of {0}.
        | I need three {0}. Which ones come to mind?""",
        answer="Three {0} are {1}.",
        short="{1}.",
        rows=_LISTS,
    ),
    "translation": _topic(
        "How do you say {0} in {1}? | What is the {1} word for {0}? | Translate {0} into {1}.",
        answer="The {1} word for {0} is {2}.",
        short="{2}.",
        rows=_TRANSLATIONS,
    ),
    "after": _topic(
        "Which {0} comes after {1}? | What {0} follows {1}? | What is the next {0} after {1}?",
        answer="The {0} after {1} is {2}.",
        short="{2}.",
        rows=_AFTER,
    ),
    "before": _topic(
        "Which {0} comes before {1}? | What {0} is just before {1}? | Name the {0} before {1}.",
        answer="The {0} before {1} is {2}.",
        short="{2}.",
        rows=_BEFORE,
    ),
    "length": _topic(
        "How many days does {0} have? | How long is {0}? | Tell me the number of days in {0}.",
        answer="The month of {0} has {1} days.",
        short="{1} days.",
        rows=_LENGTHS,
    ),
    "conversion": _topic(
        "How many {0} are there in {1} {2}? | Convert {1} {2} to {0}. | {1} {2} are how many {0}?",
        answer="{1} {2} are {3} {0}.",
        short="{3} {0}.",
        rows=_CONVERTED,
    ),
}
