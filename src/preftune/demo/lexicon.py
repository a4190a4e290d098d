"""The words of the review world: products, what they consist of, and what may be said about them, with what force.

Every number here is part of the ground-truth reward's definition (`preftune.demo.world`). Adjectives and predicates
carry a valence in [-1, 1]; degree adverbs multiply it, negation multiplies it by `NEGATION`.
"""

from __future__ import annotations

PRODUCTS: dict[str, tuple[str, ...]] = {
    "blender": ("motor", "lid", "jug", "base", "cable", "design"),
    "camera": ("lens", "screen", "battery", "strap", "menu", "design"),
    "kettle": ("lid", "handle", "spout", "base", "cable", "finish"),
    "laptop": ("screen", "keyboard", "battery", "speaker", "hinge", "charger"),
    "phone": ("screen", "battery", "camera", "speaker", "charger", "case"),
    "backpack": ("strap", "zip", "pocket", "fabric", "buckle", "design"),
    "lamp": ("switch", "shade", "base", "cable", "bulb", "finish"),
    "radio": ("speaker", "dial", "antenna", "battery", "display", "case"),
    "chair": ("seat", "backrest", "armrest", "fabric", "frame", "finish"),
    "printer": ("tray", "cartridge", "display", "cable", "menu", "case"),
    "tent": ("fabric", "zip", "frame", "floor", "pocket", "design"),
    "watch": ("strap", "dial", "battery", "buckle", "display", "case"),
}

ADJECTIVES: dict[str, float] = {
    "superb": 0.65,
    "wonderful": 0.65,
    "excellent": 0.6,
    "great": 0.5,
    "lovely": 0.5,
    "good": 0.4,
    "solid": 0.4,
    "sturdy": 0.35,
    "pleasant": 0.35,
    "decent": 0.2,
    "plain": -0.2,
    "clumsy": -0.35,
    "flimsy": -0.4,
    "poor": -0.4,
    "bad": -0.4,
    "cheap": -0.35,
    "awful": -0.6,
    "terrible": -0.6,
    "dreadful": -0.65,
    "useless": -0.65,
}

DEGREES: dict[str, float] = {
    "slightly": 0.5,
    "fairly": 0.75,
    "really": 1.2,
    "very": 1.25,
    "truly": 1.4,
    "remarkably": 1.5,
}

# Each with its negated form.
COPULAS: dict[str, str] = {
    "is": "is not",
    "feels": "does not feel",
    "looks": "does not look",
    "seems": "does not seem",
}

# Negation turns an opinion round and takes half of its force: "not terrible" is faint praise.
NEGATION = -0.5

# Said of a part of the product: "the lid broke within a week".
PART_PREDICATES: dict[str, float] = {
    "works like a charm": 0.7,
    "exceeded my hopes": 0.8,
    "has never let me down": 0.7,
    "does its job": 0.25,
    "does what it should": 0.3,
    "broke within a week": -0.8,
    "fell apart": -0.8,
    "needs constant care": -0.35,
    "lets me down every day": -0.7,
    "could be better": -0.25,
}

# Said of the whole product, each once per review: (subject of the opinion, valence).
VERDICTS: dict[str, tuple[str, float]] = {
    "I love it": ("feeling", 0.9),
    "I like it": ("feeling", 0.5),
    "I can live with it": ("feeling", 0.1),
    "I dislike it": ("feeling", -0.5),
    "I hate it": ("feeling", -0.9),
    "I would buy it again": ("advice", 0.7),
    "I would recommend it to a friend": ("advice", 0.8),
    "I would not buy it again": ("advice", -0.7),
    "I would not recommend it to a friend": ("advice", -0.8),
    "I regret the purchase": ("advice", -0.7),
    "it is worth every cent": ("price", 0.7),
    "the price is fair": ("price", 0.4),
    "the price is too high": ("price", -0.4),
    "it is a waste of money": ("price", -0.8),
    "it beats my old one": ("rival", 0.6),
    "it is no better than my old one": ("rival", -0.3),
    "my old one was better": ("rival", -0.6),
}

# Facts without an opinion.
FACTS: tuple[str, ...] = (
    "it came in a brown box",
    "the parcel took three days",
    "I use it twice a week",
    "it came with a spare part",
    "my neighbour has the same one",
    "the manual is in four languages",
)

OPENINGS: tuple[str, ...] = (
    "I bought this {product} {time}.",
    "I got this {product} {time} as a gift.",
    "My {person} gave me this {product} {time}.",
    "My {person} and I picked this {product} {time}.",
    "We ordered this {product} {time}.",
    "I chose this {product} for my {person} {time}.",
)
TIMES: tuple[str, ...] = (
    "last week",
    "last month",
    "last year",
    "in March",
    "in June",
    "in the spring",
    "a year ago",
    "two weeks ago",
)
PEOPLE: tuple[str, ...] = ("sister", "brother", "father", "mother", "aunt", "uncle", "boss", "friend")
