"""The shop: its catalogue, its pages, what a purchase is worth, and what an agent may answer."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("bm25s")

from flash.envs.webshop import WebShopEnv, open_shop
from flash.envs.webshop.catalogue import CATEGORIES, Goal, Product, make_goal, make_products
from flash.envs.webshop.pages import ResultsPage
from flash.types import Task

ROOT = Path(__file__).parents[2]
SMALL = {"products": 60, "page_size": 4}
HAIR, SKIN, TOPS = CATEGORIES[0], CATEGORIES[1], CATEGORIES[2]


def product(kind="shampoo", category=HAIR, attributes=("vegan", "mild", "new"), price=20):
    options = {"scent": ("mint", "coconut"), "volume": ("100 ml", "250 ml")}
    return Product(
        id="B1", kind=kind, brand="x", category=category, attributes=attributes, options=options,
        price=price,
    )  # fmt: skip


GOAL = Goal(
    product=product(), attributes=("vegan", "mild"), options={"scent": "mint", "volume": "250 ml"},
    limit=30, text="",
)  # fmt: skip
ALL_CHOSEN = {"scent": "mint", "volume": "250 ml"}


@pytest.mark.parametrize(
    ("bought", "chosen", "score"),
    [
        (product(), ALL_CHOSEN, 1.0),
        (product(price=30), ALL_CHOSEN, 1.0),
        (product(price=31), ALL_CHOSEN, 4 / 5),
        (product(attributes=("mild", "new", "soft")), ALL_CHOSEN, 4 / 5),
        (product(), {"scent": "mint"}, 4 / 5),
        (product(), {"scent": "coconut", "volume": "100 ml"}, 3 / 5),
        (product(), {}, 3 / 5),
        (product(kind="conditioner"), ALL_CHOSEN, 0.5),
        (product(kind="face wash", category=SKIN), ALL_CHOSEN, 0.1),
        (product(kind="hoodie", category=TOPS), ALL_CHOSEN, 0.0),
        (product(kind="conditioner", price=99), {}, 0.5 * 2 / 5),
    ],
)
def test_a_purchase_is_worth_its_type_times_the_share_that_is_met(bought, chosen, score):
    assert GOAL.score(bought, chosen) == pytest.approx(score)


def bought_after(env, *actions):
    return [env.step(action) for action in actions][-1]


def test_the_wanted_product_with_its_options_is_a_success_and_ends_the_episode():
    env = WebShopEnv(**SMALL)
    env.reset(seed=3)
    goal = env._goal
    env.step(f"search[{goal.product.title}]")
    for _ in range(50):
        if f"click[{goal.product.id}]" in env._info()["admissible_commands"]:
            break
        env.step("click[Next >]")
    env._turns = 0
    options = [f"click[{value}]" for value in goal.options.values()]
    text, reward, terminated, truncated, info = bought_after(
        env, f"click[{goal.product.id}]", *options, "click[Buy Now]"
    )
    assert (text, reward, terminated, truncated) == ("Thank you.", 1.0, True, False)
    assert info["success"] is True
    assert info["admissible_commands"] == []


def test_part_of_what_is_wanted_is_a_part_of_the_reward_and_no_success():
    env = WebShopEnv(**SMALL)
    env.reset(seed=3)
    first = env.step(f"search[{env._goal.product.kind}]")[4]["admissible_commands"][-1]
    _, reward, terminated, _, info = bought_after(env, first, "click[buy now]")
    assert 0 < reward < 1
    assert (terminated, info["success"]) == (True, False)


def test_pages_turn_forth_and_back_and_lead_to_a_product_and_its_details():
    env = WebShopEnv(max_turns=30, **SMALL)
    env.reset(seed=3)
    searched = env.step("search[black shampoo table]")[0]
    assert searched.startswith("Back to Search | Page 1 of ")
    assert len(searched.splitlines()) == 5
    turned = env.step("click[Next >]")[0]
    assert turned.startswith("Back to Search | Page 2 of ") and "< Prev" in turned
    assert env.step("click[< Prev]")[0] == searched
    number = searched.splitlines()[1].split(" | ")[0]
    page = env.step(f"click[{number}]")[0]
    shown = next(p for p in env._shop.products if p.id == number)
    assert shown.title in page and f"${shown.price}" in page
    for name, told in (("Description", shown.description), ("Features", shown.features),
                       ("Attributes", " , ".join(shown.attributes))):  # fmt: skip
        assert env.step(f"click[{name}]")[0] == f"Back to Search | < Prev\n{told}"
        assert env.step("click[< Prev]")[0] == page
    value = next(iter(shown.options.values()))[0]
    assert f"{value} (chosen)" in env.step(f"click[{value}]")[0]
    assert env.step("click[< Prev]")[0] == searched
    assert env.step("click[Back to Search]")[0] == "Search for what you need."
    assert env.step("search[]")[0] == "Back to Search\nNothing was found."


def test_the_last_page_of_results_is_not_empty_and_has_no_next():
    for found, size, pages in ((8, 4, 2), (9, 4, 3), (3, 4, 1)):
        page = ResultsPage(tuple(make_products(found, 0)), size)
        for _ in range(pages - 1):
            assert not page.is_last
            page = page.buttons()["Next >"]
        assert page.shown
        assert "Next >" not in page.buttons()
        assert page.text().startswith(f"Back to Search | Page {pages} of {pages}")


def test_what_is_bought_at_the_last_turn_is_no_truncated_episode():
    env = WebShopEnv(max_turns=3, **SMALL)
    env.reset(seed=3)
    first = env.step("search[shampoo]")[4]["admissible_commands"][-1]
    assert bought_after(env, first, "click[Buy Now]")[2:4] == (True, False)
    env.reset(seed=3)
    assert [env.step("search[rug]")[2:4] for _ in range(3)][-1] == (False, True)


def test_an_option_that_is_chosen_anew_takes_the_place_of_the_one_before():
    env = WebShopEnv(**SMALL)
    env.reset(seed=3)
    env.step(env.step("search[shampoo]")[4]["admissible_commands"][-1])
    one, other = next(iter(env._page.product.options.values()))[:2]
    text = bought_after(env, f"click[{one}]", f"click[{other}]")[0]
    assert f"{other} (chosen)" in text
    assert text.count("(chosen)") == 1


def test_a_search_finds_what_has_the_words_and_of_equals_the_older():
    shop = open_shop(1_000, 0)
    found = shop.search("Gold-plated HDMI cable!")
    assert {p.kind for p in found[:5]} == {"hdmi cable"}
    assert all("gold plated" in p.attributes for p in found[:5])
    assert len(found) == 50
    assert shop.search("xyzzy") == ()
    assert shop.search("cable hdmi") == shop.search("hdmi cable hdmi")
    scores = shop._index.get_scores(["kelmark"])
    best = sorted(range(1_000), key=lambda number: (-scores[number], number))[:50]
    assert shop.search("kelmark") == tuple(shop.products[number] for number in best)


PIECES = st.sampled_from(
    ["search[", "click[", "]", "[", "Buy Now", "< Prev", "Next >", "Back to Search", "shampoo",
     "B00001", "B99999", "attributes", "black", " ", "\n", "CLICK[b00000]"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(),
            st.lists(PIECES, max_size=4).map("".join),
            st.integers(0, 10**6),  # a button of the page
        ),
        max_size=10,
    ),
    st.integers(0, 9),
)
def test_whatever_is_said_gets_an_answer_and_a_reward_from_0_to_1(said, seed):
    env = WebShopEnv(max_turns=8, **SMALL)
    text, info = env.reset(seed=seed)
    for number, words in enumerate(said, start=1):
        buttons = info["admissible_commands"]
        action = buttons[words % len(buttons)] if isinstance(words, int) else words
        text, reward, terminated, truncated, info = env.step(action)
        assert text in env.observation_space
        assert 0 <= reward <= 1
        assert not reward or terminated
        assert info["success"] is (reward == 1)
        assert truncated is (number == 8 and not terminated)
        if terminated or truncated:
            break


@pytest.mark.parametrize(
    "action",
    ["", "buy now", "click[Buy Now]", "click[B00001]", "click", "search", "click[]", "[]",
     "search[a] search[b]]x", "search[rug]" + " " * 1_000,
     "search[" + "a " * 1_000_000 + "]", "click[" * 1_000_000],
)  # fmt: skip
def test_what_cant_be_done_changes_nothing_and_is_told(action):
    env = WebShopEnv(**SMALL)
    env.reset(seed=1)
    text, reward, terminated, truncated, info = env.step(action)
    assert text == "That can't be done here.\nSearch for what you need."
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    assert info["admissible_commands"] == ["search[words]"]


def test_a_search_from_a_page_of_results_is_refused_and_case_and_spaces_dont_matter():
    env = WebShopEnv(**SMALL)
    env.reset(seed=1)
    page = env.step("  SEARCH [ Shampoo ] ")[0]
    assert page.startswith("Back to Search | Page 1")
    assert env.step("search[rug]")[0] == f"That can't be done here.\n{page}"
    assert env.step("Click[ BACK TO SEARCH ]")[0] == "Search for what you need."


def test_a_goal_belongs_to_one_split_and_its_product_fulfils_it():
    products = make_products(200, 0)

    def goals(split):
        return [make_goal(products, seed, split) for seed in range(200)]

    wanted = {
        split: {(g.product.kind, frozenset(g.attributes), str(g.options), g.limit)
                for g in goals(split)}
        for split in ("train", "heldout")
    }  # fmt: skip
    assert not wanted["train"] & wanted["heldout"]
    assert len(wanted["train"]) > 150
    for goal in goals("train"):
        assert goal.score(goal.product, goal.options) == 1
        assert goal.product.price < goal.limit
        assert all(p.price != goal.limit for p in products), "lower than it, or above"
        for part in (*goal.attributes, goal.product.kind, *goal.options.values()):
            assert part in goal.text


def test_another_process_makes_the_same_shop_and_demonstrations():
    code = (
        "from flash.envs.webshop import WebShopEnv; from flash.types import Task\n"
        "env = WebShopEnv(products=60, wander=0.3)\n"
        "turns = [turn for seed in range(5) for turn in env.demonstrate(Task(seed))]\n"
        "print([[turn.observation.text, turn.action] for turn in turns])"
    )
    env = WebShopEnv(products=60, wander=0.3)
    here = [[t.observation.text, t.action] for s in range(5) for t in env.demonstrate(Task(s))]
    there = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert there.stdout.strip() == str(here)


def test_a_customer_who_knows_the_shop_always_gets_what_is_wanted():
    env = WebShopEnv(products=200, page_size=4)
    for seed in range(60):
        actions = [turn.action for turn in env.demonstrate(Task(seed))]
        env.reset(seed=seed)
        assert bought_after(env, *actions)[1] == 1.0


def test_all_that_is_seen_and_said_is_in_the_vocabulary():
    env = WebShopEnv(wander=0.4, **SMALL)
    known = {word for phrase in env.vocabulary() for word in phrase.lower().split()}
    known |= {"|", ",", ".", "a", "and", "(chosen)"}
    for seed in range(40):
        for turn in env.demonstrate(Task(seed)):
            assert set(turn.observation.text.lower().replace("$", "").split()) <= known
            words = turn.action.lower().replace("[", "[ ").replace("]", " ]").split()
            assert set(words) <= known


def test_gymnasium_makes_it():
    env = gymnasium.make("flash/WebShop-v0", products=60)
    assert env.reset(seed=1)[1]["goal"] in env.reset(seed=1)[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [({"products": 9}, "products=9"), ({"page_size": "4"}, "page_size='4' must be a whole"),
     ({"page_size": 51}, "page_size=51"),
     ({"split": "test"}, "split='test'"), ({"max_turns": 0}, "max_turns=0"),
     ({"wander": 1}, "wander=1")],
)  # fmt: skip
def test_options_that_cant_be_are_told_by_name_and_value(options, told):
    with pytest.raises(ValueError, match=told):
        WebShopEnv(**options)


def test_nothing_is_logged_of_the_index(caplog):
    open_shop(61, 0).search("shampoo")
    assert caplog.records == []
