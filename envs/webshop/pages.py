"""The shop's pages, and where their buttons lead.

SearchPage → ResultsPage ⇄ ProductPage ⇄ DetailPage
                                ↓
                             Receipt
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from .catalogue import Product

BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
DETAILS = ("Description", "Features", "Attributes")
SEARCH_FOR, NOTHING_FOUND, BOUGHT = "Search for what you need.", "Nothing was found.", "Thank you."


class Page(Protocol):
    """A page as it is seen: one of another state is another page."""

    def text(self) -> str: ...

    def buttons(self) -> Mapping[str, "Page"]:
        """The page that each leads to."""
        ...


class SearchPage:
    """Where a search may be made."""

    def text(self) -> str:
        return SEARCH_FOR

    def buttons(self) -> Mapping[str, Page]:
        return {}


@dataclass(frozen=True)
class ResultsPage:
    """Some of what was found, `size` products a page; pages count from 0."""

    found: tuple[Product, ...]
    size: int
    number: int = 0

    @property
    def shown(self) -> tuple[Product, ...]:
        return self.found[self.number * self.size : (self.number + 1) * self.size]

    @property
    def is_last(self) -> bool:
        return (self.number + 1) * self.size >= len(self.found)

    def text(self) -> str:
        if not self.found:
            return f"{BACK}\n{NOTHING_FOUND}"
        pages = -(-len(self.found) // self.size)
        turns = [name for name in (PREVIOUS, NEXT) if name in self.buttons()]
        lines = [_line(product.id, *_head(product)) for product in self.shown]
        return "\n".join([_line(BACK, f"Page {self.number + 1} of {pages}", *turns), *lines])

    def buttons(self) -> Mapping[str, Page]:
        turned: dict[str, Page] = {}
        if self.number:
            turned[PREVIOUS] = replace(self, number=self.number - 1)
        if not self.is_last:
            turned[NEXT] = replace(self, number=self.number + 1)
        products = {product.id: ProductPage(self, product, {}) for product in self.shown}
        return {BACK: SearchPage(), **turned, **products}


@dataclass(frozen=True)
class ProductPage:
    """A product, with the options that were chosen of it so far."""

    results: ResultsPage
    product: Product
    chosen: Mapping[str, str]

    def text(self) -> str:
        options = [
            _line(
                name,
                *(
                    f"{value} (chosen)" if value == self.chosen.get(name) else value
                    for value in values
                ),
            )
            for name, values in self.product.options.items()
        ]
        return "\n".join(
            [_line(BACK, PREVIOUS), _line(*_head(self.product)), *options, _line(*DETAILS, BUY)]
        )

    def buttons(self) -> Mapping[str, Page]:
        options = {
            value: replace(self, chosen={**self.chosen, name: value})
            for name, values in self.product.options.items()
            for value in values
        }
        details = {name: DetailPage(self, name) for name in DETAILS}
        receipt = Receipt(self.product, self.chosen)
        return {BACK: SearchPage(), PREVIOUS: self.results, **options, **details, BUY: receipt}


@dataclass(frozen=True)
class DetailPage:
    """One of `DETAILS` of a product."""

    of: ProductPage
    name: str

    def text(self) -> str:
        product = self.of.product
        told = {
            "Description": product.description,
            "Features": product.features,
            "Attributes": " , ".join(product.attributes),
        }
        return f"{_line(BACK, PREVIOUS)}\n{told[self.name]}"

    def buttons(self) -> Mapping[str, Page]:
        return {BACK: SearchPage(), PREVIOUS: self.of}


@dataclass(frozen=True)
class Receipt:
    """The end: what was bought, with which options."""

    product: Product
    chosen: Mapping[str, str]

    def text(self) -> str:
        return BOUGHT

    def buttons(self) -> Mapping[str, Page]:
        return {}


def _line(*parts: str) -> str:
    return " | ".join(parts)


def _head(product: Product) -> tuple[str, str]:
    return product.title, f"${product.price}"
