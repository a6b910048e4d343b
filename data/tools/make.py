"""Writes train.jsonl and test.jsonl: conversations with tools, the same bytes at every run.

A dozen tools, each with phrasings for the training set and others for the test set alone. Every row
lists three to five tools. Four kinds of rows: a call; a call with its result and the answer in words;
the same with a second question that needs a call; and none due, because the tool is not listed, a
detail is missing, or nothing was asked of a tool.

    python data/tools/make.py [FOLDER]
"""

import datetime
import json
import random
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 20260414
ROWS = {"train": 480, "test": 120}
# Of the rows: a call alone, with its answer, with a second question, and none.
KINDS = {"call": 11, "answered": 5, "again": 2, "none": 6}

CITIES = [
    "Lisbon", "Oslo", "Nairobi", "Kyoto", "Montreal", "Hamburg", "Cork", "Valencia", "Denver",
    "Auckland", "Krakow", "Bergen", "Lyon", "Austin", "Seville", "Ghent", "Porto", "Halifax",
    "Turin", "Izmir", "Leeds", "Bologna", "Tampere", "Cusco",
]  # fmt: skip
PEOPLE = [
    "Amira", "Jonas", "Priya", "Mum", "Dad", "Wei", "Oksana", "Tom", "Lucía", "Kwame", "Ingrid",
    "Noor", "Marek", "Grandma", "Sofia", "Diego", "Yuki", "Hannah",
]  # fmt: skip
FOODS = [
    "eggs", "oat milk", "coffee beans", "basil", "rye bread", "olive oil", "lemons", "rice",
    "dish soap", "yoghurt", "carrots", "batteries", "flour", "bin bags", "tomatoes", "cat food",
    "butter", "toothpaste", "onions", "chickpeas",
]  # fmt: skip
ROOMS = ["bedroom", "living room", "kitchen", "office", "bathroom", "nursery", "hallway"]
CURRENCIES = {
    "euros": "EUR", "US dollars": "USD", "pounds": "GBP", "yen": "JPY", "Swiss francs": "CHF",
    "Norwegian kroner": "NOK", "Canadian dollars": "CAD", "zloty": "PLN", "Indian rupees": "INR",
}  # fmt: skip
RATES = {
    "EUR": 1.0, "USD": 1.09, "GBP": 0.86, "JPY": 163.0, "CHF": 0.95, "NOK": 11.6, "CAD": 1.48,
    "PLN": 4.31, "INR": 91.0,
}  # fmt: skip
LANGUAGES = ("Spanish", "German", "French", "Portuguese")
SENTENCES = {
    "Where is the nearest pharmacy?": (
        "¿Dónde está la farmacia más cercana?", "Wo ist die nächste Apotheke?",
        "Où est la pharmacie la plus proche ?", "Onde fica a farmácia mais próxima?",
    ),
    "I am allergic to nuts.": (
        "Soy alérgico a los frutos secos.", "Ich bin gegen Nüsse allergisch.",
        "Je suis allergique aux noix.", "Sou alérgico a nozes.",
    ),
    "Could we have the bill, please?": (
        "¿Nos trae la cuenta, por favor?", "Könnten wir bitte die Rechnung haben?",
        "L'addition, s'il vous plaît.", "Pode trazer a conta, por favor?",
    ),
    "What time does the museum close?": (
        "¿A qué hora cierra el museo?", "Um wie viel Uhr schließt das Museum?",
        "À quelle heure ferme le musée ?", "A que horas fecha o museu?",
    ),
    "My luggage has not arrived.": (
        "Mi equipaje no ha llegado.", "Mein Gepäck ist nicht angekommen.",
        "Mes bagages ne sont pas arrivés.", "A minha bagagem não chegou.",
    ),
    "Two tickets for tonight, please.": (
        "Dos entradas para esta noche, por favor.", "Zwei Karten für heute Abend, bitte.",
        "Deux billets pour ce soir, s'il vous plaît.", "Dois bilhetes para esta noite, por favor.",
    ),
    "Is this seat taken?": (
        "¿Está ocupado este asiento?", "Ist dieser Platz besetzt?",
        "Cette place est-elle prise ?", "Este lugar está ocupado?",
    ),
    "Thank you for your patience.": (
        "Gracias por su paciencia.", "Danke für Ihre Geduld.",
        "Merci de votre patience.", "Obrigado pela sua paciência.",
    ),
    "How much is this one?": (
        "¿Cuánto cuesta este?", "Wie viel kostet dieses hier?",
        "Combien coûte celui-ci ?", "Quanto custa este?",
    ),
    "The shower does not work.": (
        "La ducha no funciona.", "Die Dusche funktioniert nicht.",
        "La douche ne marche pas.", "O chuveiro não funciona.",
    ),
}  # fmt: skip
MESSAGES = [
    "I'm running ten minutes late", "the keys are under the blue pot", "happy birthday",
    "dinner is at seven", "I got the job", "please call me when you land", "the meeting moved to Monday",
    "I'll bring the salad", "the train is delayed", "thanks for the flowers", "the dog is fine",
    "the tickets are in your inbox",
]  # fmt: skip
# As a calendar has it, and as people say it.
EVENTS = {
    "dentist": "the dentist", "team meeting": "a team meeting", "piano lesson": "a piano lesson",
    "parents' evening": "the parents' evening", "car inspection": "the car inspection",
    "yoga class": "a yoga class", "lunch with Priya": "lunch with Priya", "book club": "book club",
    "job interview": "a job interview", "vet appointment": "a vet appointment",
    "budget review": "the budget review", "school play": "the school play",
}  # fmt: skip
CUISINES = ["Thai", "Ethiopian", "vegetarian", "Lebanese", "Italian", "Korean", "Mexican", "Indian"]
STREETS = [
    "the central station", "City Hall", "the airport", "12 Mill Lane", "the university library",
    "St Mary's Hospital", "the harbour", "44 Rosewood Avenue", "the covered market",
    "the botanical garden", "the football stadium", "9 Chapel Street",
]  # fmt: skip
ARTISTS = [
    "Nina Simone", "Radiohead", "Fela Kuti", "Björk", "Miles Davis", "Dolly Parton", "Daft Punk",
    "Cesária Évora", "The Cure", "Joni Mitchell", "Ravi Shankar", "ABBA",
]  # fmt: skip
TIMERS = ["pasta", "bread", "laundry", "tea", "rice", "cake", "soup", "pizza", "face mask"]
SKIES = ["sunshine", "clouds", "light rain", "strong wind", "morning fog", "clear skies", "showers"]


@dataclass(frozen=True)
class Slot:
    """What a person says, and the argument that it stands for."""

    spoken: str
    value: Any


@dataclass(frozen=True)
class Tool:
    """A function, how people ask for it, what it gives back, and how that is told.

    Attributes:
        required: the parameters that a call must have; others are given where they were said.
        asked: phrasings, of the training set and of the test set; {slots} are parameters.
        result: of drawn slots, what the function gives back.
        told: how the result is told.
        wanted: the same in a few words, as "I can't ..." goes on.
        vague: requests that lack a detail, and the question that asks for it.
        follow: phrasings of a second question.
    """

    description: str
    parameters: dict[str, dict[str, Any]]
    required: tuple[str, ...]
    draw: Callable[[random.Random, datetime.date], dict[str, Slot]]
    asked: dict[str, list[str]]
    result: Callable[[random.Random, dict[str, Any]], dict[str, Any]]
    told: list[str]
    wanted: str
    vague: dict[str, list[tuple[str, str]]]
    follow: dict[str, list[str]]

    def schema(self, name: str) -> dict[str, Any]:
        """The tool as a row lists it."""
        parameters = {
            "type": "object",
            "properties": self.parameters,
            "required": list(self.required),
        }
        function = {"name": name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def text(about: str) -> dict[str, Any]:
    """The schema of a text."""
    return {"type": "string", "description": about}


def number(about: str, kind: str = "integer") -> dict[str, Any]:
    """The schema of a number."""
    return {"type": kind, "description": about}


DATE = text("YYYY-MM-DD")


def plain(value: Any) -> Slot:
    """A value that is said as it is."""
    return Slot(str(value), value)


def day(draw: random.Random, today: datetime.date) -> Slot:
    """A day of the next weeks, as people name it."""
    ahead = draw.choice([0, 1, 1, *range(2, 40)])
    date = today + datetime.timedelta(ahead)
    ending = {1: "st", 2: "nd", 3: "rd"}.get(date.day % 10 if date.day // 10 != 1 else 0, "th")
    names = {0: ["today"], 1: ["tomorrow"]}.get(ahead) or [
        f"on {date.day} {date:%B}",
        f"on {date:%B} {date.day}{ending}",
        f"on the {date.day}{ending} of {date:%B}",
        *([f"on {date:%A}"] if ahead < 7 else []),
    ]
    return Slot(draw.choice(names), date.isoformat())


def event(draw: random.Random) -> dict[str, Slot]:
    """Something for the calendar."""
    title = draw.choice(list(EVENTS))
    return {"title": plain(title), "event": plain(EVENTS[title])}


def clock(draw: random.Random) -> Slot:
    """A time of the day."""
    hour, minute = draw.randint(7, 20), draw.choice([0, 0, 15, 30, 45])
    short = (
        f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"
    )
    return Slot(draw.choice([short, f"{hour}:{minute:02}"]), f"{hour:02}:{minute:02}")


def some_items(draw: random.Random) -> Slot:
    """One to four things to buy."""
    items = draw.sample(FOODS, draw.choice([1, 2, 2, 3, 3, 4]))
    spoken = items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
    return Slot(spoken, items)


def duration(draw: random.Random) -> Slot:
    """A length of time."""
    minutes = draw.choice([3, 5, 7, 8, 10, 12, 15, 20, 25, 30, 40, 45, 60, 90])
    spoken = {30: "half an hour", 60: "an hour", 90: "an hour and a half"}.get(minutes)
    if spoken is None or draw.random() < 0.4:
        spoken = f"{minutes} minutes"
    return Slot(spoken, minutes)


def money(draw: random.Random, today: datetime.date) -> dict[str, Slot]:
    """An amount in one currency, and another to change it into."""
    source, target = draw.sample(sorted(CURRENCIES), 2)
    amount = draw.choice(
        [draw.randint(2, 99), draw.randint(1, 90) * 50, draw.randint(100, 999) / 10]
    )
    amount = int(amount) if float(amount).is_integer() else amount
    return {
        "amount": plain(amount),
        "source": Slot(source, CURRENCIES[source]),
        "target": Slot(target, CURRENCIES[target]),
    }


def pair(draw: random.Random, pool: list[str], first: str, second: str) -> dict[str, Slot]:
    """Two different ones of a pool."""
    one, two = draw.sample(pool, 2)
    return {first: plain(one), second: plain(two)}


def exchanged(draw: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    """An amount in the other currency."""
    rate = RATES[given["target"]] / RATES[given["source"]]
    return {"amount": round(given["amount"] * rate, 2), "currency": given["target"]}


def weather(draw: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    """A forecast."""
    low = draw.randint(4, 19)
    return {"sky": draw.choice(SKIES), "low": low, "high": low + draw.randint(3, 10)}


def restaurants(draw: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    """A restaurant."""
    first = draw.choice(["Café", "Casa", "The", "Little", "Old", "Golden"])
    second = draw.choice(["Linde", "Alba", "Harbour", "Lantern", "Fig Tree", "Saffron", "Mill"])
    return {"name": f"{first} {second}", "rating": draw.randint(38, 49) / 10}


def way(draw: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    """How long the way is."""
    minutes = draw.randint(6, 55)
    speed = {"walk": 0.08, "bike": 0.25, "car": 0.6, "transit": 0.4}[given.get("mode", "walk")]
    return {"minutes": minutes, "km": round(minutes * speed, 1)}


def flight(draw: random.Random, given: dict[str, Any]) -> dict[str, Any]:
    """A flight."""
    code = f"{draw.choice(['KL', 'LH', 'TP', 'SK', 'EI'])}{draw.randint(100, 1999)}"
    departs = f"{draw.randint(6, 21):02}:{draw.choice(['05', '20', '35', '50'])}"
    return {"flight": code, "departs": departs, "price_eur": draw.randint(49, 620)}


TOOLS: dict[str, Tool] = {
    "get_weather": Tool(
        "Weather forecast for a city.",
        {"city": text("the city"), "date": DATE},
        ("city",),
        lambda draw, today: {"city": plain(draw.choice(CITIES)), "date": day(draw, today)},
        {
            "train": [
                "What's the weather like in {city}?",
                "Will it rain in {city} {date}?",
                "Do I need an umbrella in {city} {date}?",
                "How warm will it get in {city} {date}?",
                "weather {city} {date}",
                "We're driving up to {city} {date}. What should we expect, weather-wise?",
                "Is it cold in {city} right now?",
                "Give me the forecast for {city} {date}, please.",
                "I'm packing for {city}. How's the weather over there?",
            ],
            "test": [
                "Should I take a coat to {city} {date}?",
                "Can you check whether it'll be dry in {city} {date}?",
                "Tell me what the sky is doing in {city}.",
                "I fly to {city} {date} and have no idea what to wear. What's the forecast?",
                "any chance of sun in {city} {date}?",
            ],
        },
        weather,
        [
            "In {city} it will be between {low} and {high} °C: {sky}.",
            "Expect {sky} in {city}, with {low} to {high} °C.",
            "The forecast for {city} says {sky}, {low} °C at night and {high} °C during the day.",
        ],
        "look up the weather",
        {
            "train": [
                ("What's the weather going to be?", "For which city?"),
                ("Will it rain tomorrow?", "Where? Tell me the city and I'll check."),
            ],
            "test": [("Do I need sunglasses tomorrow?", "That depends on where: which city are you in?")],
        },
        {
            "train": ["And in {city}?", "How about {city}?", "What about {city}, same question?"],
            "test": ["Now the same for {city}, please.", "And over in {city}?"],
        },
    ),
    "set_timer": Tool(
        "Starts a kitchen timer.",
        {"minutes": number("length"), "label": text("what it is for")},
        ("minutes",),
        lambda draw, today: {"minutes": duration(draw), "label": plain(draw.choice(TIMERS))},
        {
            "train": [
                "Set a timer for {minutes}.",
                "Timer for the {label}, {minutes}.",
                "Remind me about the {label} in {minutes}.",
                "Start a timer for the {label}: {minutes} please",
                "Can you count down {minutes} for me?",
                "The {label} needs {minutes}. Set a timer, would you?",
                "{minutes} on the clock, go!",
                "I need a timer, {minutes}, for the {label}.",
            ],
            "test": [
                "Give me a shout in {minutes}.",
                "Let me know when {minutes} have passed, it's for the {label}.",
                "Please time {minutes} for my {label}.",
                "Countdown of {minutes} starting now",
            ],
        },
        lambda draw, given: {"timer": draw.randint(1, 9), "status": "running"},
        ["Your timer is running: {minutes}.", "Done, I'll ring after {minutes}.", "Started: {minutes}."],
        "set timers",
        {
            "train": [
                ("Set a timer.", "For how long?"),
                ("Can you time my pasta?", "Sure. How many minutes does it need?"),
            ],
            "test": [("I've put the bread in the oven, set a timer please.", "How long should it bake?")],
        },
        {
            "train": ["And another one for {minutes}.", "Add a second one: {minutes} for the {label}."],
            "test": ["Plus one more, {minutes}, for the {label}."],
        },
    ),
    "create_event": Tool(
        "Adds an event to the calendar.",
        {
            "title": text("what it is"),
            "date": DATE,
            "time": text("HH:MM"),
            "minutes": number("length"),
        },
        ("title", "date", "time"),
        lambda draw, today: {
            **event(draw),
            "date": day(draw, today),
            "time": clock(draw),
            "minutes": plain(draw.choice([30, 40, 45, 50, 90])),
        },
        {
            "train": [
                "Put {event} in my calendar {date} at {time}.",
                "I have {event} {date} at {time}, add it please.",
                "Schedule {event} {date}, {time}.",
                "New event: {title}, {date}, {time}, {minutes} minutes.",
                "Can you block {minutes} minutes {date} at {time} for {event}?",
                "add {event} {date} {time}",
                "Don't let me forget: {title} {date} at {time}. Calendar, please.",
                "Book {event} into my diary {date} from {time}, it takes {minutes} minutes.",
            ],
            "test": [
                "Could you note down {event} {date} at {time}?",
                "There's {event} {date}, starting {time}. Save it for me.",
                "Pencil in {event} {date} at {time} for {minutes} minutes.",
                "My agenda needs one more thing, {title}: {date} at {time}.",
            ],
        },
        lambda draw, given: {"saved": True, "conflicts": []},
        ["It's in your calendar: {title} at {time}.", "Saved: {title}, {date} at {time}.",
         "Done. You have no other events then."],
        "add events to a calendar",
        {
            "train": [
                ("Put the dentist in my calendar.", "When is it? I need the date and the time."),
                ("Schedule a team meeting tomorrow.", "At what time tomorrow?"),
            ],
            "test": [("Add yoga class to my diary, please.", "On which day, and at what time?")],
        },
        {
            "train": ["Also {event} {date} at {time}.", "And {event}, {date}, {time}."],
            "test": ["One more: {event} {date} at {time}."],
        },
    ),
    "convert_currency": Tool(
        "Converts an amount of money.",
        {
            "amount": number("how much", "number"),
            "source": text("currency code"),
            "target": text("currency code"),
        },
        ("amount", "source", "target"),
        money,
        {
            "train": [
                "How much is {amount} {source} in {target}?",
                "Convert {amount} {source} to {target}.",
                "What do I get in {target} for {amount} {source}?",
                "{amount} {source} in {target}?",
                "The hotel wants {amount} {source}. What's that in {target}?",
                "I owe a friend {amount} {source}; how many {target} is that?",
                "Please change {amount} {source} into {target} for me.",
            ],
            "test": [
                "If I swap {amount} {source}, how many {target} will I have?",
                "A jacket costs {amount} {source} here. In {target}, please?",
                "Work out {amount} {source} as {target}.",
                "what would {amount} {source} be worth in {target}",
            ],
        },
        exchanged,
        ["That is {converted} {target}.", "{amount} {source} are about {converted} {target}.",
         "You would get {converted} {target}."],
        "convert money",
        {
            "train": [
                ("How much is 200 dollars?", "In which currency would you like to know?"),
                ("Convert my money to yen.", "How much, and from which currency?"),
            ],
            "test": [("Change 75 pounds for me.", "Into which currency?")],
        },
        {
            "train": ["And {amount} {source} in {target}?", "What about {amount} {source} to {target}?"],
            "test": ["Same for {amount} {source}, but in {target}."],
        },
    ),
    "send_message": Tool(
        "Sends a text message to a contact.",
        {"to": text("contact"), "text": text("the message")},
        ("to", "text"),
        lambda draw, today: {
            "to": plain(draw.choice(PEOPLE)),
            "text": plain(draw.choice(MESSAGES)),
        },
        {
            "train": [
                'Text {to}: "{text}"',
                'Send {to} a message saying "{text}".',
                'Message {to} "{text}", please.',
                "Tell {to} this: {text}",
                'Write to {to}: "{text}"',
                'Can you send "{text}" to {to}?',
                'Let {to} know: "{text}"',
            ],
            "test": [
                'Drop {to} a line: "{text}"',
                'I\'d like {to} to get this text: "{text}"',
                'Pass "{text}" on to {to}.',
                'Shoot {to} a message with "{text}"',
            ],
        },
        lambda draw, given: {"status": draw.choice(["sent", "delivered"])},
        ["Your message to {to} is on its way.", "Sent to {to}.", "Done, {to} has your message."],
        "send messages",
        {
            "train": [
                ("Send a message to Priya.", "What should it say?"),
                ("Text that I'm late.", "Who should get the message?"),
            ],
            "test": [("Message Tom for me.", "Gladly. What would you like to tell Tom?")],
        },
        {
            "train": ['And {to}: "{text}"', 'Send {to} one too: "{text}"'],
            "test": ['{to} should get this as well: "{text}"'],
        },
    ),
    "add_to_shopping_list": Tool(
        "Adds items to the shopping list.",
        {"items": {"type": "array", "items": {"type": "string"}}},
        ("items",),
        lambda draw, today: {"items": some_items(draw)},
        {
            "train": [
                "Add {items} to my shopping list.",
                "We're out of {items}. Put that on the list, please.",
                "Put {items} on the shopping list",
                "Shopping list: {items}",
                "I need to buy {items}, write it down.",
                "Can you add {items} to what we have to buy?",
                "Next time I shop I must get {items}. Note that.",
            ],
            "test": [
                "Don't let me come home from the shop without {items}.",
                "The shopping list should also have {items}.",
                "Jot down {items} for the supermarket.",
                "We've run out of {items}, add that please",
            ],
        },
        lambda draw, given: {"items_on_list": len(given["items"]) + draw.randint(0, 9)},
        ["Added {items}.", "{items}: on your list.", "Done, the list now has {items_on_list} items."],
        "keep a shopping list",
        {
            "train": [
                ("Add something to my shopping list.", "What should I add?"),
                ("Put it on the shopping list.", "What would you like on it?"),
            ],
            "test": [("My shopping list is missing something.", "What should I add to it?")],
        },
        {
            "train": ["And {items}.", "Oh, and {items} too."],
            "test": ["Throw in {items} as well."],
        },
    ),
    "find_restaurants": Tool(
        "Finds restaurants in a city.",
        {"city": text("the city"), "cuisine": text("kind of food"), "guests": number("how many")},
        ("city", "cuisine"),
        lambda draw, today: {
            "city": plain(draw.choice(CITIES)),
            "cuisine": plain(draw.choice(CUISINES)),
            "guests": plain(draw.randint(2, 9)),
        },
        {
            "train": [
                "Find me a {cuisine} restaurant in {city}.",
                "Where can {guests} of us eat {cuisine} food in {city}?",
                "Any good {cuisine} places in {city}?",
                "{cuisine} food in {city}, for {guests} people",
                "I'm craving something {cuisine}. I'm in {city}.",
                "We're {guests} people in {city} and want {cuisine} food. Ideas?",
                "Recommend a {cuisine} place to eat in {city}, please.",
            ],
            "test": [
                "Which {cuisine} kitchen would you pick in {city}?",
                "Table for {guests}, {cuisine}, somewhere in {city}. What is there?",
                "Got a tip for {cuisine} dinner in {city}?",
                "my friends and I ({guests} in all) fancy {cuisine} tonight in {city}",
            ],
        },
        restaurants,
        ["{name} is well liked: {rating} stars.", "Try {name} in {city}, rated {rating}.",
         "I found {name}, a {cuisine} place with {rating} stars."],
        "look for restaurants",
        {
            "train": [
                ("Find a restaurant in Lyon.", "What kind of food do you feel like?"),
                ("I'd like Thai food tonight.", "In which city are you?"),
            ],
            "test": [("Where could we eat something Korean?", "Tell me the city and I'll have a look.")],
        },
        {
            "train": ["And something {cuisine} in {city}?", "What about {cuisine} food in {city}?"],
            "test": ["Is there anything {cuisine} in {city} too?"],
        },
    ),
    "translate": Tool(
        "Translates a text.",
        {"text": text("the text"), "language": text("into which language")},
        ("text", "language"),
        lambda draw, today: {
            "text": plain(draw.choice(sorted(SENTENCES))),
            "language": plain(draw.choice(LANGUAGES)),
        },
        {
            "train": [
                'How do you say "{text}" in {language}?',
                'Translate "{text}" into {language}.',
                "{language} for: {text}",
                'What is "{text}" in {language}?',
                'I need this in {language}: "{text}"',
                'Please put "{text}" into {language} for me.',
            ],
            "test": [
                'Turn "{text}" into {language}, will you?',
                'A {language} version of "{text}", please.',
                'My host only speaks {language}. Help me say "{text}"',
                'what\'s the {language} for "{text}"',
            ],
        },
        lambda draw, given: {
            "translation": SENTENCES[given["text"]][LANGUAGES.index(given["language"])]
        },
        ["{translation}", 'You say: "{translation}"', 'That would be "{translation}"'],
        "translate texts",
        {
            "train": [
                ("Translate something into German for me.", "Which text should I translate?"),
                ('How do you say "good luck"?', "In which language?"),
            ],
            "test": [("I need a sentence in French.", "Which sentence? I'll translate it.")],
        },
        {
            "train": ['And "{text}" in {language}?', 'Now "{text}", in {language}.'],
            "test": ['Then "{text}" in {language} too, please.'],
        },
    ),
    "get_directions": Tool(
        "Finds the way between two places.",
        {
            "origin": text("start"),
            "destination": text("end"),
            "mode": {"type": "string", "enum": ["walk", "bike", "car", "transit"]},
        },
        ("origin", "destination"),
        lambda draw, today: {
            **pair(draw, STREETS, "origin", "destination"),
            "mode": draw.choice(
                [Slot("on foot", "walk"), Slot("by bike", "bike"), Slot("by car", "car"),
                 Slot("by bus", "transit"), Slot("by public transport", "transit")]
            ),
        },
        {
            "train": [
                "How do I get from {origin} to {destination}?",
                "How long does it take from {origin} to {destination} {mode}?",
                "Directions from {origin} to {destination} {mode}, please.",
                "I'm at {origin} and need to get to {destination} {mode}.",
                "What's the best way from {origin} to {destination}?",
                "Route {mode} from {origin} to {destination}",
                "Can I get from {origin} to {destination} {mode}?",
            ],
            "test": [
                "We want to go to {destination}, starting at {origin}, {mode}. Which way?",
                "Guide me from {origin} over to {destination}.",
                "Is it far from {origin} to {destination} {mode}?",
                "I have to be at {destination} soon and I'm still at {origin}. Show me the way {mode}.",
            ],
        },
        way,
        ["It takes {minutes} minutes ({km} km).", "{km} km from {origin}, about {minutes} minutes {mode}.",
         "You will need {minutes} minutes to get to {destination}."],
        "look up routes",
        {
            "train": [
                ("How do I get to the airport?", "Where do you start from?"),
                ("Give me directions from City Hall.", "Where would you like to go?"),
            ],
            "test": [("Show me the way to the harbour.", "From where?")],
        },
        {
            "train": ["And from {origin} to {destination} {mode}?",
                      "And from {origin} to {destination}?"],
            "test": ["What about {origin} to {destination}, {mode}?"],
        },
    ),
    "play_music": Tool(
        "Plays music.",
        {"artist": text("who"), "shuffle": {"type": "boolean"}, "volume": number("0 to 100")},
        ("artist",),
        lambda draw, today: {
            "artist": plain(draw.choice(ARTISTS)),
            "shuffle": Slot("shuffled", True),
            "volume": plain(draw.randint(2, 18) * 5),
        },
        {
            "train": [
                "Play some {artist}.",
                "Put on {artist}, {shuffle}.",
                "I want to hear {artist} at volume {volume}.",
                "{artist}, please, {shuffle}, volume {volume}",
                "Could you play {artist} for a while?",
                "Let's have {artist} on, volume {volume}.",
                "I'm in the mood for {artist}.",
            ],
            "test": [
                "Time for a bit of {artist}!",
                "Fill the room with {artist}, volume {volume}.",
                "Start {artist}, all songs {shuffle}.",
                "how about {artist} while I cook",
            ],
        },
        lambda draw, given: {"status": "playing", "songs": draw.randint(11, 240)},
        ["Now playing {artist}.", "Here is {artist}: {songs} songs.", "{artist} it is. Enjoy!"],
        "play music",
        {
            "train": [
                ("Play some music.", "What would you like to hear?"),
                ("Put something on, volume 40.", "With pleasure. Which artist?"),
            ],
            "test": [("It's too quiet in here, play something.", "Who would you like to hear?")],
        },
        {
            "train": ["Now {artist}, please.", "Switch to {artist}, {shuffle}."],
            "test": ["Enough of that, go over to {artist}."],
        },
    ),
    "set_thermostat": Tool(
        "Sets the temperature of a room.",
        {"room": text("which room"), "celsius": number("degrees", "number")},
        ("room", "celsius"),
        lambda draw, today: {
            "room": plain(draw.choice(ROOMS)),
            "celsius": plain(draw.choice([16, 17, 18, 18.5, 19, 19.5, 20, 20.5, 21, 21.5, 22, 23])),
        },
        {
            "train": [
                "Set the {room} to {celsius} degrees.",
                "Make it {celsius} degrees in the {room}.",
                "{room} at {celsius}, please.",
                "It's freezing. Heat the {room} to {celsius} °C.",
                "I'd like {celsius} degrees in the {room}",
                "Turn the heating in the {room} to {celsius}.",
                "The {room} should be {celsius} °C tonight.",
            ],
            "test": [
                "Could the {room} be {celsius} degrees?",
                "Bring the {room} to {celsius} °C before we get home.",
                "We sleep better at {celsius}, adjust the {room}.",
                "change the {room} temperature to {celsius}",
            ],
        },
        lambda draw, given: {"room": given["room"], "now": draw.randint(15, 24), "set": given["celsius"]},
        ["The {room} is set to {celsius} °C.", "Done: {celsius} °C in the {room}; it has {now} °C now.",
         "The {room} will be at {celsius} °C soon."],
        "change the heating",
        {
            "train": [
                ("Make the bedroom warmer.", "To how many degrees?"),
                ("Set the heating to 20 degrees.", "In which room?"),
            ],
            "test": [("I'm cold in the office, turn the heating up.", "What temperature would you like there?")],
        },
        {
            "train": ["And {celsius} in the {room}.", "The {room} too, at {celsius}."],
            "test": ["Same in the {room}, but {celsius} degrees."],
        },
    ),
    "find_flights": Tool(
        "Finds flights between two cities.",
        {
            "origin": text("from"),
            "destination": text("to"),
            "date": DATE,
            "passengers": number("how many"),
        },
        ("origin", "destination", "date"),
        lambda draw, today: {
            **pair(draw, CITIES, "origin", "destination"),
            "date": day(draw, today),
            "passengers": Slot(*draw.choice([("two", 2), ("three", 3), ("four", 4), ("five", 5)])),
        },
        {
            "train": [
                "Find a flight from {origin} to {destination} {date}.",
                "I need to fly from {origin} to {destination} {date}.",
                "Flights {origin} to {destination} {date} for {passengers} people",
                "What flies from {origin} to {destination} {date}?",
                "There are {passengers} of us going from {origin} to {destination} {date}. Flights?",
                "Look for a plane to {destination} {date}, I start in {origin}.",
                "Cheapest flight {date} from {origin} to {destination}?",
            ],
            "test": [
                "How can I fly to {destination} from {origin} {date}?",
                "Check seats from {origin} to {destination} {date}, {passengers} of them.",
                "We leave {origin} {date} and would like to land in {destination}. What's on offer?",
                "Is there a plane from {origin} to {destination} {date}?",
            ],
        },
        flight,
        ["{flight} leaves {origin} at {departs} and costs {price_eur} euros.",
         "The best one is {flight} at {departs}, for {price_eur} euros.",
         "There is {flight}, {departs}, {price_eur} euros."],
        "search for flights",
        {
            "train": [
                ("Find me a flight to Oslo.", "From which city, and on which day?"),
                ("I want to fly from Lyon to Cork.", "On which day would you like to fly?"),
            ],
            "test": [("Look up flights leaving Denver tomorrow.", "Where would you like to fly to?")],
        },
        {
            "train": ["And from {origin} to {destination} {date}?",
                      "Then {origin} to {destination} {date}, please."],
            "test": ["What about {origin} to {destination} {date}?"],
        },
    ),
}  # fmt: skip

# Nothing asked of a tool, though the words may be near.
TALK = {
    "train": [
        ("Thanks, that's all for today.", "You're welcome. Have a good day!"),
        ("Good morning!", "Good morning! What can I do for you?"),
        ("What is the capital of Peru?", "Lima."),
        ("Who wrote Don Quixote?", "Miguel de Cervantes."),
        ("How does a thermostat work?",
         "It measures the temperature and switches the heating on or off to keep it "
         "near the one that you set."),
        ("Is 20 degrees too warm for a bedroom?",
         "Most people sleep well between 16 and 19 degrees, so it is a little warm."),
        ("Why do planes leave white trails?",
         "Their exhaust holds water vapour, which freezes in the cold air."),
        ("What's the difference between weather and climate?",
         "Weather is what happens on a day; climate is the average over many years."),
        ("How many minutes are in a day?", "1,440."),
        ("What does a restaurant critic do?",
         "They eat at restaurants and write about the food, the service and the place."),
        ("Which language is spoken in Brazil?", "Portuguese."),
        ("Is the euro older than the yen?", "No. The yen dates from 1871, the euro from 1999."),
        ("How do I boil an egg?",
         "Put it in boiling water: six minutes for a soft yolk, ten for a hard one."),
        ("Tell me a joke.", "Why did the scarecrow win a prize? He was outstanding in his field."),
        ("What rhymes with rain?", "Train, lane, plain and again, for instance."),
        ("Do you like music?",
         "I don't hear it, but I enjoy talking about it. What do you listen to?"),
        ("I had a long day.", "I'm sorry to hear that. I hope the evening is a quiet one."),
        ("How tall is Mount Everest?", "8,849 metres."),
        ("What is a calendar year?", "The time from 1 January to 31 December."),
        ("Can you spell 'itinerary'?", "I-t-i-n-e-r-a-r-y."),
        ("What is oat milk made of?", "Oats and water, often with a little oil and salt."),
        ("Who was Nina Simone?",
         "An American singer, pianist and activist, known for Feeling Good."),
        ("Ok, perfect.", "Glad to help. Anything else?"),
        ("Is it rude to text during dinner?",
         "Many people find it so. Ask the others, or wait until the meal is over."),
        ("How many cents are in a euro?", "One hundred."),
        ("What's seven times eight?", "56."),
        ("Name three Italian dishes.", "Risotto, lasagne and minestrone."),
        ("What can you help me with?",
         "Tell me what you need, and I'll use the tools that I have here."),
        ("Sorry, wrong window.", "No problem!"),
        ("What's a layover?", "The time that you wait at an airport between two flights."),
    ],
    "test": [
        ("Great, nothing else.", "You're welcome!"),
        ("Hello there.", "Hello! How can I help?"),
        ("What is the capital of Norway?", "Oslo."),
        ("Why is the sky blue?", "Air scatters blue light more than red."),
        ("How many seconds are in an hour?", "3,600."),
        ("What do you call a timer made of sand?", "An hourglass."),
        ("Which currency did Germany have before the euro?", "The German mark."),
        ("Is a direct flight the same as a non-stop flight?",
         "No. A direct flight may land on the way; a non-stop one does not."),
        ("Who sang Dancing Queen?", "ABBA."),
        ("Can bread be frozen?", "Yes, for about three months. Slice it first."),
        ("What does 'au revoir' mean?", "It is French for goodbye."),
        ("I feel a bit tired.", "A short rest may help. Take care of yourself."),
    ],
}  # fmt: skip
# What goes on from one question to the next unless it is said again.
CARRIED = ("date", "mode", "passengers")
CANNOT = {
    "train": [
        "Sorry, I can't {wanted} here.",
        "I'm afraid I have no way to {wanted}.",
        "That's not something I can do: I can't {wanted} at the moment.",
    ],
    "test": ["Sorry, I can't {wanted} here.", "I'm afraid I have no way to {wanted}."],
}


def fields(phrasing: str) -> set[str]:
    """The slots that a phrasing has."""
    return {name for _, name, _, _ in string.Formatter().parse(phrasing) if name}


def said(draw: random.Random, phrasing: str, slots: dict[str, Slot]) -> str:
    """A phrasing filled; now and then without the capital and the full stop, as people type."""
    filled = phrasing.format(**{name: slot.spoken for name, slot in slots.items()})
    filled = re.sub(r"\b([Aa]) (?=Ethiopian|Italian|Indian)", r"\1n ", filled)
    if not phrasing[0].islower():
        filled = filled[0].upper() + filled[1:]
    first = phrasing.split()[0]
    if draw.random() < 0.15 and "{" not in first and first not in ("I", "I'm", "I'd", "I've"):
        filled = filled[0].lower() + filled[1:].removesuffix(".")
    return filled


class Turns:
    """One conversation as it is written, with what was drawn for it."""

    def __init__(self, draw: random.Random, split: str) -> None:
        """Draw the day and begin, now and then with a system prompt that names it."""
        self.draw, self.split = draw, split
        self.today = datetime.date(2026, 1, 1) + datetime.timedelta(draw.randrange(330))
        self.messages: list[dict[str, Any]] = []
        self.calls = 0

    def say(self, role: str, content: str) -> None:
        """Add a turn in words."""
        self.messages.append({"role": role, "content": content})

    def ask(self, name: str, phrasings: list[str]) -> tuple[dict[str, Slot], dict[str, Any]]:
        """A question to a tool; returns what was drawn for it, and the arguments that were said."""
        tool = TOOLS[name]
        phrasing = self.draw.choice(phrasings)
        slots = tool.draw(self.draw, self.today)
        named = fields(phrasing)
        self.say("user", said(self.draw, phrasing, slots))
        arguments = {
            key: slots[key].value for key in tool.parameters if key in named or key in tool.required
        }
        return slots, arguments

    def call(self, name: str, arguments: dict[str, Any]) -> None:
        """Add an answer that is a call."""
        self.calls += 1
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call{self.calls:05}", "type": "function", "function": function}
        self.messages.append({"role": "assistant", "content": None, "tool_calls": [call]})

    def tell(self, name: str, slots: dict[str, Slot], arguments: dict[str, Any]) -> None:
        """The result of the last call, and the answer that tells it."""
        tool = TOOLS[name]
        result = tool.result(self.draw, arguments)
        self.messages.append(
            {
                "role": "tool",
                "tool_call_id": f"call{self.calls:05}",
                "name": name,
                "content": json.dumps(result, ensure_ascii=False),
            }
        )
        known = {key: slots[key].spoken for key in arguments} | {
            key: value for key, value in result.items() if key not in arguments
        }
        if name == "convert_currency":
            known["converted"] = f"{result['amount']:,.2f}"
        usable = [one for one in tool.told if fields(one) <= known.keys()]
        answer = self.draw.choice(usable).format(**known)
        answer = re.sub(r"\ba (?=Ethiopian|Italian|Indian)", "an ", answer)
        self.say("assistant", answer[0].upper() + answer[1:])


def conversation(draw: random.Random, split: str, kind: str, name: str) -> dict[str, Any]:
    """One row: its tools and its messages."""
    turns, tool = Turns(draw, split), TOOLS[name]
    others = draw.sample([other for other in TOOLS if other != name], draw.randint(2, 4))
    listed = [name, *others]
    if kind == "none":
        reason = draw.choice(["absent", "vague", "talk"])
        if reason == "absent":  # the tool for it is not there
            turns.ask(name, tool.asked[split])
            turns.say("assistant", draw.choice(CANNOT[split]).format(wanted=tool.wanted))
            listed = [*others, draw.choice([t for t in TOOLS if t not in listed])]
        else:
            asked, answer = draw.choice(tool.vague[split] if reason == "vague" else TALK[split])
            turns.say("user", asked)
            turns.say("assistant", answer)
    else:
        slots, arguments = turns.ask(name, tool.asked[split])
        turns.call(name, arguments)
        if kind != "call":
            turns.tell(name, slots, arguments)
        if kind == "again":
            slots, more = turns.ask(name, tool.follow[split])
            turns.call(name, {key: more.get(key, arguments.get(key)) for key in tool.parameters
                              if key in more or (key in arguments and key in CARRIED)})  # fmt: skip
    draw.shuffle(listed)
    messages = turns.messages
    # A day such as "tomorrow" needs today's; elsewhere it is there now and then all the same.
    if "date" in tool.parameters or draw.random() < 0.3:
        today = f"Today is {turns.today:%A}, {turns.today.day} {turns.today:%B %Y}."
        messages = [{"role": "system", "content": today}, *messages]
    return {"tools": [TOOLS[each].schema(each) for each in listed], "messages": messages}


def rows(split: str) -> list[dict[str, Any]]:
    """The rows of one split, every tool and every kind in turn, none twice."""
    draw = random.Random(f"{SEED} {split}")
    kinds = [kind for kind, share in KINDS.items() for _ in range(share)]
    made: list[dict[str, Any]] = []
    seen = set[str]()
    while len(made) < ROWS[split]:
        name = list(TOOLS)[len(made) % len(TOOLS)]
        kind = draw.choice(kinds)
        row = conversation(draw, split, kind, name)
        key = " ".join(turn["content"] for turn in row["messages"] if turn["role"] == "user")
        if key not in seen:
            seen.add(key)
            made.append(row)
    draw.shuffle(made)
    return made


def main(folder: Path) -> None:
    """Write both files."""
    for split in ROWS:
        lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows(split)]
        (folder / f"{split}.jsonl").write_bytes(("\n".join(lines) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
