"""What the shop sells, who wants what of it, and what a purchase is worth.

All of it is made from a seed: products of a tree of departments, categories and kinds, each with
attributes, options to choose from, and a price.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Category:
    """Kinds of products with attributes, options and a range of prices in common."""

    department: str
    name: str
    kinds: tuple[str, ...]
    attributes: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    prices: tuple[int, int]


_COLOURS = ("black", "white", "red", "blue", "green", "grey", "pink", "brown")
_CLOTHES = {"colour": _COLOURS, "size": ("small", "medium", "large", "x-large")}
_SHOES = {"colour": _COLOURS, "size": ("us 6", "us 7", "us 8", "us 9", "us 10")}
_BOTTLES = {
    "scent": ("lavender", "coconut", "citrus", "mint"),
    "volume": ("100 ml", "250 ml", "500 ml"),
}
_PACKS = {
    "flavour": ("vanilla", "chocolate", "ginger", "honey", "apple"),
    "pack": ("pack of 1", "pack of 3", "pack of 6", "pack of 12"),
}
_ROOMS = {"colour": _COLOURS, "width": ("60 cm", "90 cm", "120 cm", "150 cm")}
_CABLES = {"colour": ("black", "white", "grey"), "length": ("1 metre", "2 metres", "5 metres")}

CATEGORIES = (
    Category(
        "beauty", "hair care", ("shampoo", "conditioner", "hair oil", "hair mask"),
        ("sulfate free", "paraben free", "cruelty free", "for dry hair", "for curly hair"),
        _BOTTLES, (6, 45),
    ),
    Category(
        "beauty", "skin care", ("face cream", "body lotion", "face wash", "sun cream"),
        ("fragrance free", "oil free", "cruelty free", "for sensitive skin", "for oily skin"),
        _BOTTLES, (8, 60),
    ),
    Category(
        "fashion", "tops", ("t-shirt", "blouse", "hoodie", "cardigan"),
        ("long sleeve", "short sleeve", "machine washable", "slim fit", "loose fit"),
        _CLOTHES, (12, 70),
    ),
    Category(
        "fashion", "trousers", ("jeans", "leggings", "shorts", "joggers"),
        ("high waist", "machine washable", "straight leg", "elastic waist", "slim fit"),
        _CLOTHES, (15, 90),
    ),
    Category(
        "fashion", "shoes", ("sneakers", "sandals", "ankle boots", "slippers"),
        ("non slip", "rubber sole", "memory foam", "lace up", "water resistant"),
        _SHOES, (18, 120),
    ),
    Category(
        "grocery", "snacks", ("granola bars", "cookies", "crackers", "popcorn"),
        ("gluten free", "low sugar", "dairy free", "high protein", "non gmo"),
        _PACKS, (4, 50),
    ),
    Category(
        "grocery", "drinks", ("green tea", "coffee beans", "hot cocoa", "herbal tea"),
        ("caffeine free", "fair trade", "low sugar", "dairy free", "freeze dried"),
        _PACKS, (5, 55),
    ),
    Category(
        "home", "furniture", ("bookcase", "coffee table", "desk", "bench"),
        ("easy assembly", "solid wood", "space saving", "heavy duty", "with storage"),
        _ROOMS, (50, 190),
    ),
    Category(
        "home", "textiles", ("curtains", "rug", "blanket", "table cloth"),
        ("machine washable", "super soft", "stain resistant", "non slip", "hand woven"),
        _ROOMS, (15, 110),
    ),
    Category(
        "electronics", "cables", ("usb cable", "hdmi cable", "audio cable", "network cable"),
        ("gold plated", "fast charging", "high speed", "heavy duty", "nylon braided"),
        _CABLES, (6, 40),
    ),
)  # fmt: skip
_BRANDS = (
    "alderby", "borrowdale", "caldra", "dunmere", "elvanto", "fernhope", "galtree", "hollis",
    "iverno", "juniva", "kelmark", "lorrin",
)  # fmt: skip
_ATTRIBUTES_OF_A_PRODUCT = 3  # the last of them is not in its title
_LIMIT_STEP = 10  # dollars: goals' limits are multiples of it, and prices are not
_HELDOUT_SHARE = 5  # one goal of so many is held out

_REQUESTS = (
    "i need a {attributes} {kind} , with {options} , price lower than {limit} dollars",
    "find me a {kind} that is {attributes} , with {options} , for less than {limit} dollars",
    "i am looking for a {attributes} {kind} , {options} , that costs less than {limit} dollars",
)


@dataclass(frozen=True)
class Product:
    """One thing in the shop; `options` are the values to choose from, by their name."""

    id: str
    kind: str
    brand: str
    category: Category
    attributes: tuple[str, ...]
    options: Mapping[str, tuple[str, ...]]
    price: int

    @cached_property
    def title(self) -> str:
        return f"{self.brand} {self.kind} , {' , '.join(self.attributes[:-1])}"

    @property
    def description(self) -> str:
        return f"{self.kind} by {self.brand} , in {self.category.department} , {self.category.name}"

    @property
    def features(self) -> str:
        return " . ".join(f"{name} {' , '.join(of)}" for name, of in self.options.items())

    @property
    def indexed(self) -> str:
        """What a search looks at."""
        return " ".join((self.title, self.attributes[-1], self.description, self.features))


@dataclass(frozen=True)
class Goal:
    """What a customer wants, made so that `product` is one that has it all."""

    product: Product
    attributes: tuple[str, ...]
    options: Mapping[str, str]
    limit: int
    text: str

    def score(self, bought: Product, chosen: Mapping[str, str]) -> float:
        """WebShop's partial reward, 0 to 1, of a product with the options that were chosen.

        The share of attributes, options and limit of the price that are met, times how near the
        type is: 1 for the kind, 0.5 for its category, 0.1 for its department, else 0.
        Yao et al. 2022, eq. 1; there titles are compared for the type, here the shop's own tree.
        """
        met = sum(attribute in bought.attributes for attribute in self.attributes)
        met += sum(chosen.get(name) == value for name, value in self.options.items())
        met += bought.price <= self.limit
        share = met / (len(self.attributes) + len(self.options) + 1)
        return _type_score(bought, self.product) * share

    def best_score(self, product: Product) -> float:
        """With the options that it has of those that are wanted."""
        return self.score(
            product,
            {name: of for name, of in self.options.items() if of in product.options.get(name, ())},
        )


def _type_score(bought: Product, wanted: Product) -> float:
    if bought.kind == wanted.kind:
        return 1.0
    if bought.category is wanted.category:
        return 0.5
    return 0.1 if bought.category.department == wanted.category.department else 0.0


def make_products(number: int, seed: int) -> list[Product]:
    """So many products; the same ones for the same seed."""
    rng = random.Random(f"products {seed}")
    return [_product(rng, f"B{index:05d}") for index in range(number)]


def _product(rng: random.Random, identifier: str) -> Product:
    category = rng.choice(CATEGORIES)
    price = rng.randint(*category.prices)
    return Product(
        id=identifier,
        kind=rng.choice(category.kinds),
        brand=rng.choice(_BRANDS),
        category=category,
        attributes=tuple(rng.sample(category.attributes, _ATTRIBUTES_OF_A_PRODUCT)),
        options={name: _some(rng, values) for name, values in category.options.items()},
        price=price + (price % _LIMIT_STEP == 0),
    )


def _some(rng: random.Random, values: Sequence[str]) -> tuple[str, ...]:
    """At least two of the values, in their order."""
    kept = set(rng.sample(range(len(values)), rng.randint(2, len(values))))
    return tuple(value for index, value in enumerate(values) if index in kept)


def make_goal(products: Sequence[Product], seed: int, split: Split) -> Goal:
    """The first goal of the seed that belongs to the split, whatever words it is put in."""
    rng = random.Random(f"goal {seed}")
    while True:
        goal = _goal(rng, rng.choice(products))
        wanted = repr((goal.product.kind, sorted(goal.attributes), goal.options, goal.limit))
        if (zlib.crc32(wanted.encode()) % _HELDOUT_SHARE == 0) == (split == "heldout"):
            return goal


def _goal(rng: random.Random, product: Product) -> Goal:
    attributes = tuple(rng.sample(product.attributes, rng.randint(1, 2)))
    options = {name: rng.choice(values) for name, values in product.options.items()}
    limit = (product.price // _LIMIT_STEP + rng.randint(1, 2)) * _LIMIT_STEP
    text = rng.choice(_REQUESTS).format(
        attributes=" and ".join(attributes),
        kind=product.kind,
        options=" and ".join(f"{name} {value}" for name, value in options.items()),
        limit=limit,
    )
    return Goal(product=product, attributes=attributes, options=options, limit=limit, text=text)


def words() -> list[str]:
    """Names, kinds, attributes, options, prices and limits of all that any shop sells."""
    highest = max(category.prices[1] for category in CATEGORIES) + 2 * _LIMIT_STEP
    named = [
        phrase
        for of in CATEGORIES
        for phrase in (of.department, of.name, *of.kinds, *of.attributes, *of.options)
    ]
    values = [value for of in CATEGORIES for each in of.options.values() for value in each]
    requests = [part for text in _REQUESTS for part in _fixed_parts(text)]
    return [*_BRANDS, *named, *values, *requests, *map(str, range(1, highest + 1))]


def _fixed_parts(request: str) -> list[str]:
    """A request's words between what differs."""
    return [part.strip(" ,") for part in request.replace("}", "{").split("{")[::2]]
