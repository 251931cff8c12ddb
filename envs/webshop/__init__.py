"""A shop in text, with WebShop's interface: search, look, choose options, buy what was asked for.

    i need a vegan body lotion , with scent mint and volume 250 ml , price lower than 30 dollars
    > search[vegan body lotion]
    Back to Search | Page 1 of 3 | Next >
    B00412 | caldra body lotion , vegan , oil free | $23
    …
    > click[B00412]
    Back to Search | < Prev
    caldra body lotion , vegan , oil free | $23
    scent | coconut | mint
    volume | 100 ml | 250 ml
    Description | Features | Attributes | Buy Now
    > click[mint]
    > click[250 ml]
    > click[Buy Now]

The catalogue is our own and generated (`catalogue.py`); it is searched with BM25.
"""

import logging
import random
import re
from functools import lru_cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from flash.types import Observation, Task, Turn

from .catalogue import Goal, Product, Split, make_goal, make_products, words
from .pages import (
    BACK,
    BOUGHT,
    BUY,
    DETAILS,
    NEXT,
    NOTHING_FOUND,
    PREVIOUS,
    SEARCH_FOR,
    Page,
    ProductPage,
    Receipt,
    ResultsPage,
    SearchPage,
)

__all__ = ["Shop", "WebShopEnv", "open_shop"]

_RULES = (
    "You are in a shop. Answer search[words], or click[button]: buttons stand between bars, and "
    "the number of a product is one."
)
_NOT_HERE = "That can't be done here."
_ANSWER = re.compile(r"(search|click)\s*\[(.*)\]", re.IGNORECASE | re.DOTALL)
_LONGEST_ANSWER = 1_000  # characters; what is longer is taken for none
_MOST_RESULTS = 50
_PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"


class Shop:
    """Products, and BM25 over their titles, categories, attributes and options."""

    def __init__(self, products: int, seed: int) -> None:
        try:
            import bm25s  # noqa: PLC0415  (an extra)
        except ImportError as error:
            raise ImportError("webshop needs bm25s: pip install 'flash-rl[webshop]'") from error
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # its import set DEBUG
        self.products = make_products(products, seed)
        self._index = bm25s.BM25()
        self._index.index(
            [_words(product.indexed) for product in self.products], show_progress=False
        )

    def search(self, query: str) -> tuple[Product, ...]:
        """Those that any word of the query finds, the best first, and of equals the older one."""
        known = sorted(set(_words(query)) & self._index.vocab_dict.keys())
        if not known:
            return ()
        scores = self._index.get_scores(known)
        best = np.argsort(-scores, kind="stable")[:_MOST_RESULTS]
        return tuple(self.products[number] for number in best if scores[number] > 0)


@lru_cache(maxsize=2)  # each episode makes an environment anew
def open_shop(products: int, seed: int) -> Shop:
    return Shop(products, seed)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


class WebShopEnv(gymnasium.Env[str, str]):
    """One customer's wish after another, all in one shop.

    The action is `search[words]` on the search page and `click[button]` elsewhere, in any case.
    Any other leaves you where you are, and you are told so. Buying ends the episode with
    WebShop's reward, 0 to 1 (`Goal.score`), a success at 1; all other rewards are 0.

    Args:
        products: how many the shop has.
        shop: the seed that they are made from.
        page_size: products on a page of results, of which there are 50 at most.
        split: `train` or `heldout`; a goal belongs to one of them, whatever the seed. The shop is
            the same.
        max_turns: the episode is truncated after so many actions.
        wander: how often `demonstrate` presses a random button, which is imitated: what a policy
            learns from an untidy teacher, and reinforcement then removes.

    Raises ValueError for an option that can't be, ImportError without the extra `webshop`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own type)
        "render_modes": [],
        "deterministic": True,
    }
    observation_space = spaces.Text(max_length=20_000, charset=_PRINTABLE)
    action_space = spaces.Text(min_length=0, max_length=_LONGEST_ANSWER, charset=_PRINTABLE)

    def __init__(
        self,
        *,
        products: int = 1_000,
        shop: int = 0,
        page_size: int = 10,
        split: Split = "train",
        max_turns: int = 15,
        wander: float = 0.0,
    ) -> None:
        numbers = {"products": products, "page_size": page_size, "max_turns": max_turns}
        for name, value in numbers.items():
            if not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be a whole number")
        if not 10 <= products <= 100_000:
            raise ValueError(f"products={products} must be 10 to 100000")
        if not 1 <= page_size <= _MOST_RESULTS:
            raise ValueError(f"page_size={page_size} must be 1 to {_MOST_RESULTS}")
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1")
        if not 0 <= wander < 1:
            raise ValueError(f"wander={wander} must be 0 or more and below 1")
        self._shop = open_shop(products, shop)
        self._page_size = page_size
        self._split: Split = split
        self._max_turns = max_turns
        self._wander = wander
        self._goal: Goal | None = None
        self._page: Page = SearchPage()
        self._turns = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._goal = make_goal(self._shop.products, seed, self._split)
        self._page = SearchPage()
        self._turns = 0
        return f"{_RULES}\n{self._page.text()}\n{self._goal.text}", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self._goal is not None, "reset comes before step"
        self._turns += 1
        page = self._page_after(action)
        self._page = page or self._page
        text = self._page.text() if page else f"{_NOT_HERE}\n{self._page.text()}"
        score, bought = 0.0, isinstance(self._page, Receipt)
        if isinstance(self._page, Receipt):
            score = self._goal.score(self._page.product, self._page.chosen)
        truncated = not bought and self._turns >= self._max_turns
        return text, score, bought, truncated, self._info(success=score == 1.0)

    def _page_after(self, action: str) -> Page | None:
        """None for what can't be done on this page."""
        answer = _ANSWER.fullmatch(action.strip()) if len(action) <= _LONGEST_ANSWER else None
        if answer is None:
            return None
        verb, words = answer[1].lower(), answer[2].strip().lower()
        if verb == "click":
            return {name.lower(): page for name, page in self._page.buttons().items()}.get(words)
        if isinstance(self._page, SearchPage):
            return ResultsPage(self._shop.search(words), self._page_size)
        return None

    def _info(self, *, success: bool = False) -> dict[str, Any]:
        assert self._goal is not None, "reset comes first"
        return {
            "goal": self._goal.text,
            "admissible_commands": self._admissible(),
            "success": success,
        }

    def _admissible(self) -> list[str]:
        if isinstance(self._page, SearchPage):
            return ["search[words]"]
        return [f"click[{button}]" for button in self._page.buttons()]

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """Phrases, and the number of every product."""
        ids = [product.id for product in self._shop.products]
        buttons = [BACK, PREVIOUS, NEXT, BUY, *DETAILS]
        sentences = [_RULES, _NOT_HERE, SEARCH_FOR, NOTHING_FOUND, BOUGHT]
        syntax = ["search[", "click[", "]", "page", "of", "by", "chosen"]
        return [*sentences, *syntax, *buttons, *words(), *ids]

    def demonstrate(self, task: Task) -> list[Turn]:
        """The way of one who knows all products to one that fits, a random button now and then.

        It goes on past `max_turns`, to show how to come back from a wrong way.
        """
        rng = random.Random(f"demonstrate {task.seed}")
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        assert self._goal is not None
        observation, turns, done = Observation(text=text, info=info), list[Turn](), False
        while not done and len(turns) < 3 * self._max_turns:
            action = _next_action(self._page, self._goal)
            if rng.random() < self._wander and (buttons := [*self._page.buttons()]):
                action = f"click[{rng.choice(buttons)}]"
            turns.append(Turn(observation, action))
            text, reward, done, _, info = self.step(action)
            observation = Observation(text=text, reward=reward, info=info)
        return turns


def _next_action(page: Page, goal: Goal) -> str:
    """Of a customer who knows what fits the goal, wherever others have led."""
    match page:
        case SearchPage():
            return f"search[{' '.join(goal.attributes)} {goal.product.kind}]"
        case ResultsPage():
            fitting = [product.id for product in page.shown if goal.best_score(product) == 1.0]
            return f"click[{fitting[0] if fitting else BACK if page.is_last else NEXT}]"
        case ProductPage() if goal.best_score(page.product) == 1.0:
            missing = [of for name, of in goal.options.items() if page.chosen.get(name) != of]
            return f"click[{missing[0] if missing else BUY}]"
    return f"click[{PREVIOUS}]"


gymnasium.register("flash/WebShop-v0", entry_point="flash.envs.webshop:WebShopEnv")
