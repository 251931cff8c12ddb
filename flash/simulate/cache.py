"""What a simulated worker still has of requests that ended, for those that begin as they did."""

from collections import OrderedDict

Key = tuple[str, int]


class PrefixCache:
    """Tokens by whose they are. What was kept longest ago goes first."""

    def __init__(self) -> None:
        self._tokens: OrderedDict[Key, float] = OrderedDict()
        self._total = 0.0

    def of(self, key: Key) -> float:
        """How many of its tokens are there."""
        return self._tokens.get(key, 0.0)

    def keep(self, key: Key, tokens: float) -> None:
        self.take(key)
        self._tokens[key] = tokens
        self._total += tokens

    def take(self, key: Key) -> float:
        """Its tokens belong to somebody else now."""
        tokens = self._tokens.pop(key, 0.0)
        self._total -= tokens
        return tokens

    def shrink(self, room: float) -> None:
        """What runs needs all but this."""
        while self._tokens and self._total > room:
            self._total -= self._tokens.popitem(last=False)[1]

    def clear(self) -> None:
        self._tokens.clear()
        self._total = 0.0
