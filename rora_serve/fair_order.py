"""FairOrder: whose turn it is when requests wait for places in the engine. No asyncio, no clock.

1. A free place goes to the tenant whose account, over its weight, is the least; in the tenant, of
   adapters that are loaded and those that are not, to a loaded one three times in four; of these to
   the one with the least account; of its requests to the one that came first.
2. An account holds the place-seconds that were used, and for each place that is held the seconds
   of a mean request: an estimate at the start, what is used meanwhile, nothing else at the end.
3. Accounts are kept while somebody waits. Who comes starts level with who is next, whatever there
   was before: no credit for idling. Who comes back while others still wait finds its debt again.
4. Adapters to load stand in one line for each tenant. With its first turn one counts as loaded.

With N loaded adapters for P places, and requests of one sequence and at most D seconds (1 or more),
an adapter that waits is let in again within 2 D (1 + h (N - 1) / P) seconds, if it had h places the
last time it was let in. With several tenants P is the share of its own.

Source: start-time fair queueing (Goyal, Vin and Cheng 1997) for many places at once, SFQ(D) (Jin,
Chase and Kaur 2004), in a tree, with accounts that grow while requests run, as in VTC (arXiv
2401.00588). They count place-seconds where VTC counts tokens: places are what is short here.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import count

# Of a tenant's service, what adapters that have to be loaded get together while loaded ones wait.
COLD_SHARE = 0.25
_TO_LOAD, _LOADED = "to load", "loaded"
_NEVER = -1
# Debts of idle siblings that are remembered at most; the least are forgotten first.
_MAX_OWING = 1024
# The mean of seconds in place moves by this part of the difference with every request.
_MEAN_STEP = 1 / 16
_FIRST_MEAN_SECONDS = 1.0

_Entry = tuple[float, int, "_Node"]


@dataclass(eq=False)
class Claim:
    """A request that waits for places, or has them.

    Args:
        tenant, adapter: whose it is.
        weight: of the tenant, against other tenants'.
        cost: places that it needs, all of them before it begins.
        is_cold: whether its adapter has to be loaded.
        places: how many it has.
        accounts: what these are counted in.
    """

    tenant: str
    adapter: str
    weight: float
    cost: int
    is_cold: bool
    places: int = 0
    accounts: "tuple[_Node, ...]" = field(default=(), repr=False)


class FairOrder:
    """The claims that wait, in order, and the accounts of who has places.

    Cost: O(log n) comparisons for a claim among n siblings that wait, and for each sibling with
    places as many more in the seconds of a mean request. Who has neither claims nor places nor debt
    is forgotten.
    """

    def __init__(self) -> None:
        self.mean_seconds = _FIRST_MEAN_SECONDS
        self._root = _Node("", None)
        self._numbers = count()

    def note(self, seconds: float) -> None:
        """Take how long a request had its places into the mean."""
        self.mean_seconds += (seconds - self.mean_seconds) * _MEAN_STEP

    def add(self, claim: Claim, now: float) -> None:
        """Let a claim wait, behind those of its adapter."""
        tenant = self._root.child(claim.tenant)
        tenant.weight = claim.weight
        half = _TO_LOAD if claim.is_cold else _LOADED
        adapter = tenant.grandchild(claim.adapter)
        if adapter is None:
            adapter = _half(tenant, half).child(claim.adapter)
        elif adapter.is_idle and adapter.name not in _half(tenant, half).children:
            self._move(adapter, _half(tenant, half))
        adapter.claims[claim] = None
        self._line_up(adapter, now)

    def remove(self, claim: Claim) -> None:
        """Let a claim go that still waits for its turn."""
        adapter = self._root.children[claim.tenant].grandchild(claim.adapter)
        assert adapter is not None
        del adapter.claims[claim]
        self._tidy(adapter)

    def next(self, now: float) -> Claim | None:
        """Return the claim whose turn it is; it waits no more, and has to take places at once."""
        path: list[_Node] = []
        node = self._root
        while node.waiting:
            node = self._first(node, now)
            path.append(node)
        if not path:
            return None
        tenant, half, adapter = path
        claim, _ = adapter.claims.popitem(last=False)
        claim.accounts = (tenant, half, adapter)
        if half.name == _TO_LOAD:
            self._move(adapter, _half(tenant, _LOADED))
            if adapter.claims:
                self._line_up(adapter, now)
        return claim

    def take(self, claim: Claim, places: int, now: float) -> None:
        """Count places that a claim takes, or gives back if negative, from now on."""
        claim.places += places
        for node in claim.accounts:
            node.count(now)
            node.places += places
            if node.is_waiting:
                self._stand(node, node.line)
        for node in reversed(claim.accounts):
            self._tidy(node)

    def _first(self, parent: "_Node", now: float) -> "_Node":
        """Return the child whose turn it is."""
        while True:
            account, _, child = parent.waiting[0]
            if not child.places or now - child.counted <= self.mean_seconds:
                break
            child.count(now)  # what it holds has cost more than was estimated
            self._stand(child, parent.waiting)
        parent.level = max(parent.level, account)
        while parent.owing and parent.owing[0][0] <= parent.level:
            self._forget(parent.owing[0][2])
        return child

    def _line_up(self, node: "_Node", now: float) -> None:
        """Put a node that has something waiting in line, and those that it belongs to."""
        while (parent := node.parent) is not None and not node.is_waiting:
            node.count(now)
            if node.period != parent.current_period:
                node.period, node.account = parent.current_period, parent.level
            node.account += max(0.0, parent.level - self._account(node))
            self._stand(node, parent.waiting)
            node = parent

    def _tidy(self, node: "_Node") -> None:
        """Take out of line who has nothing waiting any more, and forget who has nothing at all."""
        while (parent := node.parent) is not None and not (node.waiting or node.claims):
            if node.is_waiting:
                self._leave_line(node)
            if not (node.places or node.children):
                owes = node.period == parent.current_period and self._account(node) > parent.level
                if parent.waiting and owes:
                    self._stand(node, parent.owing)
                    if len(parent.owing) > _MAX_OWING:
                        self._forget(parent.owing[0][2])
                else:
                    self._forget(node)
            node = parent

    def _leave_line(self, node: "_Node") -> None:
        parent = node.parent
        assert parent is not None
        self._stand(node, None)
        if not parent.waiting:
            parent.current_period += 1
            for _, _, idle in list(parent.owing):
                self._forget(idle)

    def _move(self, adapter: "_Node", half: "_Node") -> None:
        """Bring an adapter into the other half of its tenant, where its account is new."""
        old = adapter.parent
        assert old is not None
        self._leave_line(adapter)
        del old.children[adapter.name]
        adapter.parent, adapter.period, adapter.account = half, half.current_period, half.level
        half.children[adapter.name] = adapter

    def _forget(self, node: "_Node") -> None:
        parent = node.parent
        assert parent is not None
        self._stand(node, None)
        if not node.children:
            del parent.children[node.name]
            node.parent = None

    def _stand(self, node: "_Node", line: "list[_Entry] | None") -> None:
        """Put a node where its account belongs in a line of its parent, behind its equals."""
        if node.line is not None:
            del node.line[bisect_left(node.line, node.entry)]
        node.line = line
        if line is not None:
            node.entry = (self._account(node), next(self._numbers), node)
            insort(line, node.entry)

    def _account(self, node: "_Node") -> float:
        return node.account + node.places * self.mean_seconds / node.weight


class _Node:
    """A tenant, a half of one, or an adapter: shares places with its siblings. Or the root."""

    def __init__(self, name: str, parent: "_Node | None", weight: float = 1.0) -> None:
        self.name = name
        # Among siblings.
        self.parent = parent
        self.weight = weight
        self.places = 0
        self.account = 0.0  # place-seconds over weight, until `counted`
        self.counted = 0.0
        self.period = _NEVER  # of the parent, that `account` belongs to
        self.line: list[_Entry] | None = None  # of the parent, in which `entry` stands
        self.entry: _Entry
        # As a parent.
        self.children: dict[str, _Node] = {}
        self.waiting: list[_Entry] = []  # those with claims below, by account
        self.owing: list[_Entry] = []  # idle ones whose account is above `level`
        self.level = 0.0  # the account of who had the last turn
        self.current_period = 0  # the number of times that nobody waited
        # As an adapter.
        self.claims: OrderedDict[Claim, None] = OrderedDict()

    @property
    def is_waiting(self) -> bool:
        return self.parent is not None and self.line is self.parent.waiting

    @property
    def is_idle(self) -> bool:
        return not (self.claims or self.places)

    def child(self, name: str, weight: float = 1.0) -> "_Node":
        """Return the child of this name, a new one if there is none."""
        if name not in self.children:
            self.children[name] = _Node(name, self, weight)
        return self.children[name]

    def grandchild(self, name: str) -> "_Node | None":
        """Return the adapter of this name in either half of a tenant."""
        for half in self.children.values():
            if name in half.children:
                return half.children[name]
        return None

    def count(self, now: float) -> None:
        """Bring the account up to date."""
        self.account += self.places * (now - self.counted) / self.weight
        self.counted = now


def _half(tenant: _Node, name: str) -> _Node:
    return tenant.child(name, COLD_SHARE if name == _TO_LOAD else 1 - COLD_SHARE)
