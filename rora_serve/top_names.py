"""Which of any number of names were used most of late, in bounded memory."""

from collections.abc import Container, Iterator

# A name takes another one's place if it was used more than this many times as much, so that names
# that are used about equally do not take turns.
_CLEARLY = 2
# Candidates that are counted, for each place.
_CANDIDATES = 4


class RecentUses:
    """Bounds on how often each name was used; uses count half as much every `half_life` uses.

    For every name: lower <= uses <= upper. Without halving, a name with more than 1 / `capacity` of
    all uses is always held.

    Args:
        capacity: names that are held.
        half_life: in uses of any name.
    Cost: a use of a name that is not held looks at all that are.
    Source: Metwally, Agrawal and El Abbadi, "Efficient computation of frequent and top-k elements
        in data streams", ICDT 2005 (Space-Saving); halving is ours.
    Checked against: exact counts in tests/rora_serve/test_top_names.py.
    """

    def __init__(self, capacity: int, half_life: int) -> None:
        self._capacity = capacity
        self._half_life = half_life
        self._num_uses = 0
        self._bounds: dict[str, tuple[int, int]] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._bounds)

    def add(self, name: str) -> None:
        """Count one use."""
        bounds = self._bounds.get(name)
        if bounds is None:
            floor = 0
            if len(self._bounds) == self._capacity:
                least, (_, floor) = min(self._bounds.items(), key=lambda held: held[1][1])
                del self._bounds[least]
            bounds = (0, floor)
        self._bounds[name] = (bounds[0] + 1, bounds[1] + 1)
        self._num_uses += 1
        if self._num_uses % self._half_life == 0:
            # Rounded outwards, so that they stay bounds.
            self._bounds = {
                held: (low // 2, -(-up // 2)) for held, (low, up) in self._bounds.items()
            }

    def lower(self, name: str) -> int:
        """Return what a name was used at least."""
        return self._bounds.get(name, (0, 0))[0]

    def upper(self, name: str) -> int:
        """Return what a name was used at most."""
        if name in self._bounds:
            return self._bounds[name][1]
        if len(self._bounds) < self._capacity:
            return 0
        return min(upper for _, upper in self._bounds.values())


class TopNames:
    """At most `size` names, those that were used most of late.

    A name takes a free place at once, another one's only in `renew`.

    Args:
        size: places.
        reserved: names that never get one.
        half_life: as in RecentUses.
    """

    def __init__(
        self, size: int, *, reserved: Container[str] = (), half_life: int = 10_000
    ) -> None:
        self._size = size
        self._reserved = reserved
        self._uses = RecentUses(_CANDIDATES * size, half_life)
        self._places: dict[str, None] = {}  # in the order in which they were taken

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def use(self, name: str) -> None:
        """Count one use, and give the name a place if one is free."""
        if name in self._reserved:
            return
        self._uses.add(name)
        if len(self._places) < self._size:
            self._places[name] = None

    def renew(self) -> list[tuple[str, str]]:
        """Give places to names that were clearly used more than those that have them.

        Returns: pairs of a name that leaves and the name that takes its place.
        """
        rising = [name for name in self._uses if name not in self._places]
        rising.sort(key=self._uses.lower, reverse=True)
        falling = sorted(self._places, key=self._uses.upper)
        changes = []
        for old, new in zip(falling, rising, strict=False):
            if self._uses.lower(new) <= _CLEARLY * self._uses.upper(old):
                break
            changes.append((old, new))
        for old, new in changes:
            del self._places[old]
            self._places[new] = None
        return changes
