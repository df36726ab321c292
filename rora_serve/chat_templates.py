"""Which chat templates of adapters are served, and for how large requests.

A template is a program from whoever made the adapter. jinja2's sandbox keeps it from the server's
objects, not from its memory and time, so only a small part of the language is let in: loops over
parts of the request, text that is written and not multiplied. What is let in has a bound on its
work, from which the room for a request follows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from adapters.errors import AdapterMismatchError

MAX_SERVED_BYTES = 64 * 1024
MAX_WORK = 2**30  # characters that one rendering may copy
MAX_DEPTH = 32  # of a request's lists and objects
_MAX_WEIGHT = 4096
_MAX_LITERAL = 2**20
_MAX_LOOPS = 3  # in each other
_ROOTS = ("messages", "tools")
_INDENTED = MAX_DEPTH * 4  # spaces before each value of a line of its own
_MAX_INDENT = 4
_LONGEST_REPLACEMENT = 16

# By how much each makes text longer at most: a quote becomes two characters in JSON.
_FILTERS = {
    "capitalize": 3, "count": 1, "d": 1, "default": 1, "first": 1, "items": 1, "join": 1, "last": 1,
    "length": 1, "list": 6, "lower": 3, "map": 1, "rejectattr": 1, "replace": _LONGEST_REPLACEMENT,
    "reverse": 1, "safe": 1, "selectattr": 1, "string": 4, "tojson": 6, "trim": 1, "upper": 3,
}  # fmt: skip
_METHODS = {
    "endswith": 1, "get": 1, "items": 1, "keys": 1, "lower": 3, "lstrip": 1, "rstrip": 1,
    "split": 6, "startswith": 1, "strip": 1, "upper": 3, "values": 1,
}  # fmt: skip
_FUNCTIONS = ("namespace", "raise_exception", "strftime_now")
_TESTS = frozenset(
    {
        "boolean", "defined", "eq", "equalto", "false", "in", "iterable", "mapping", "ne", "none",
        "number", "sequence", "string", "true", "undefined",
    }
)  # fmt: skip
_LOOPED_FILTERS = ("items", "list", "rejectattr", "reverse", "selectattr")
_LOOPED_PARTS = ("content", "tool_calls")  # lists of the request; text would be looped by letters
_ENTRIES = ("items", "keys", "values")
_BUILDING = (nodes.Concat, nodes.Add, nodes.List, nodes.Tuple, nodes.Dict, nodes.Filter, nodes.Call)
_STATEMENTS = (nodes.Assign, nodes.For, nodes.If, nodes.Output)
_EXPRESSIONS = (
    nodes.Add, nodes.And, nodes.Call, nodes.Compare, nodes.Concat, nodes.CondExpr, nodes.Const,
    nodes.Dict, nodes.Filter, nodes.Getattr, nodes.Getitem, nodes.List, nodes.Mod, nodes.NSRef,
    nodes.Name, nodes.Neg, nodes.Not, nodes.Or, nodes.Slice, nodes.Sub, nodes.TemplateData,
    nodes.Test, nodes.Tuple,
)  # fmt: skip
_PARTS = (nodes.Keyword, nodes.Operand, nodes.Pair)


@dataclass(frozen=True)
class ChatTemplate:
    """A template that may be served.

    Args:
        text: of it.
        once: how many times it writes the whole request, at most, outside loops or in parts.
        each: how many times in each round of its loops.
        literal: characters of its own that it writes at most, if each place of it is reached once.
        crosses: whether it goes through the tools for each message.
        loops_parts: whether it goes through parts of one message or tool.
        loops_parts_each: whether it does so for each pair of both.
    """

    text: str
    once: int
    each: int
    literal: int
    crosses: bool
    loops_parts: bool
    loops_parts_each: bool

    def work(self, messages: object, tools: object, others: object = None) -> int:
        """Return how many characters it copies for a request, at most.

        Raises:
            ValueError: the request is nested too deeply.
            TypeError: it is not plain JSON.
        """
        sizes = [_size(part, 0) for part in (messages, tools, others)]
        letters = sum(size.letters for size in sizes)
        num_messages, num_tools = (size.entries for size in sizes[:2])
        number = num_messages * max(1, num_tools) if self.crosses else num_messages + num_tools
        if self.loops_parts:  # a part that is text is gone through letter by letter
            number += letters * (max(num_messages, num_tools) if self.loops_parts_each else 1)
        return (self.once + number * self.each) * letters + (number + 1) * self.literal


def read_template(content: bytes) -> ChatTemplate:
    """Return a template whose work is bounded.

    Raises: AdapterMismatchError: it is not; the message names construct and line.
    """
    if len(content) > MAX_SERVED_BYTES:
        raise AdapterMismatchError(
            f"its chat template has {len(content)} bytes, at most {MAX_SERVED_BYTES} are served"
        )
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        text = content.decode()
        tree = environment.parse(text)
        reader = _Reader(text)
        reader.check(tree)
        reader.block(tree.body)
        environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise _refused(error.lineno, f"a mistake ({error.message})") from error
    except (RecursionError, SyntaxError, MemoryError) as error:
        raise AdapterMismatchError("its chat template is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise AdapterMismatchError("its chat template is not UTF-8") from error
    return reader.template()


def _refused(line: int, found: str) -> AdapterMismatchError:
    return AdapterMismatchError(
        f"its chat template is not served: line {line} has {found[:200]}; loops over the "
        "request's messages and tools that write their parts are expected"
    )


@dataclass(frozen=True)
class _Weight:
    """How often an expression holds the request's text: its loop's part of it, all of it."""

    part: int = 0
    whole: int = 0
    literal: int = 0  # characters of the template's own

    def __add__(self, other: "_Weight") -> "_Weight":
        return _Weight(
            self.part + other.part, self.whole + other.whole, self.literal + other.literal
        )

    def times(self, number: int) -> "_Weight":
        return _Weight(self.part * number, self.whole * number, self.literal * number)

    def outside(self) -> "_Weight":
        """Return it where another loop goes round."""
        return _Weight(0, self.part + self.whole, self.literal)

    def or_else(self, other: "_Weight") -> "_Weight":
        """Return it where a name means one or the other."""
        return _Weight(
            max(self.part, other.part),
            max(self.whole, other.whole),
            max(self.literal, other.literal),
        )


@dataclass(frozen=True)
class _Loop:
    """A loop, and where it goes through.

    Args: root: messages or tools; names: of what it has in hand.
    """

    root: str
    names: frozenset[str]


class _Reader:
    """Reads a template's tree once, in its order."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._loops: list[_Loop] = []
        # Of names that are set: weight, the loop it was set in, and what they are a part of.
        self._weights: dict[str, tuple[_Weight, _Loop | None]] = {}
        self._origins: dict[str, set[str]] = {}
        self._numbers: set[tuple[str, str]] = set()
        self._once = self._each = self._literal = 0
        self._crosses = self._loops_parts = self._loops_parts_each = False

    def template(self) -> ChatTemplate:
        return ChatTemplate(
            self._text,
            self._once,
            self._each,
            self._literal + len(self._text),
            crosses=self._crosses,
            loops_parts=self._loops_parts,
            loops_parts_each=self._loops_parts_each,
        )

    def check(self, tree: nodes.Template) -> None:
        """Refuse what may not stand anywhere."""
        _namespaces(tree)
        fields = [node for node in tree.find_all(nodes.Assign) if _is_field(node)]
        names = {_key(node.target) for node in fields}
        self._numbers = {
            name for name in names
            if all(_is_count(value) for value in _values(tree, *name))
        }  # fmt: skip
        # Fields outlive a round of their loop: what grew into one could grow again in the next.
        grown = {_key(node.target)[0] for node in fields}
        assigned = list(tree.find_all(nodes.Assign))
        for _ in assigned:
            grown |= {
                node.target.name
                for node in assigned
                if isinstance(node.target, nodes.Name) and _names_in(node.node) & grown
            }
        for node in assigned:
            reads_grown = _names_in(node.node) & grown
            is_bounded = _is_count(node.node) or _is_answer(node.node)
            keeps = _builds(node.node) or isinstance(node.target, nodes.NSRef)
            if reads_grown and keeps and not is_bounded:
                raise _refused(node.lineno, "text that a 'namespace' adds to")
        self._check_nodes(tree)

    def _check_nodes(self, tree: nodes.Template) -> None:
        namespaces = _namespaces(tree)
        direct = [node.node for node in tree.find_all(nodes.Assign)]
        read = [node.node for node in tree.find_all(nodes.Getattr)]
        for node in _descendants(tree):
            is_made = isinstance(node, nodes.Call) and _is_namespace(node)
            is_meant = isinstance(node, nodes.Name) and node.name in namespaces
            is_set = isinstance(node, nodes.Name) and node.ctx == "store"
            if (is_made and not _has(direct, node)) or (
                is_meant and not is_set and not _has(read, node)
            ):
                # By another name it could grow unseen.
                raise _refused(
                    node.lineno, "a 'namespace' that is more than set and read by fields"
                )
            if not isinstance(node, _STATEMENTS + _EXPRESSIONS + _PARTS):
                raise _refused(node.lineno, f"{type(node).__name__.lower()!r}")
            if isinstance(node, nodes.Mod) and not self._is_remainder(node):
                raise _refused(node.lineno, "'%' of something else than a loop's index")
            if isinstance(node, nodes.Test) and node.name not in _TESTS:
                raise _refused(node.lineno, f"the test {node.name!r}")
            if isinstance(node, nodes.Name) and node.ctx == "store" and node.name in _RESERVED:
                raise _refused(node.lineno, f"another meaning for {node.name!r}")
            if isinstance(node, nodes.For) and node.recursive:
                raise _refused(node.lineno, "a recursive loop")
            if isinstance(node, nodes.Filter):
                _check_filter(node)
            if isinstance(node, nodes.Call):
                _check_call(node)

    def _is_remainder(self, node: nodes.Mod) -> bool:
        left = node.left
        while isinstance(left, nodes.Add | nodes.Sub) and _is_number(left.right):
            left = left.left
        if not isinstance(left, nodes.Getattr) or not isinstance(left.node, nodes.Name):
            return False
        is_index = left.node.name == "loop" and left.attr in ("index", "index0")
        is_count = (left.node.name, left.attr) in self._numbers
        return (is_index or is_count) and _is_number(node.right)

    def block(self, body: list[nodes.Node]) -> None:
        """Read statements one after the other."""
        for node in body:
            if isinstance(node, nodes.Output):
                for expression in node.nodes:
                    self._count(expression)
            elif isinstance(node, nodes.Assign):
                self._assign(node)
            elif isinstance(node, nodes.If):
                self._count(node.test)
                self.block(node.body)
                for other in node.elif_:
                    self._count(other.test)
                    self.block(other.body)
                self.block(node.else_)
            elif isinstance(node, nodes.For):
                self._loop(node)

    def _count(self, expression: nodes.Node) -> _Weight:
        weight = self._weight(expression)
        self._once += weight.part if self._loops else weight.part + weight.whole
        self._each += weight.whole if self._loops else 0
        self._literal += weight.literal
        if self._once + self._each > _MAX_WEIGHT or self._literal > _MAX_LITERAL:
            raise _refused(expression.lineno, "text of text too many times over")
        return weight

    def _assign(self, node: nodes.Assign) -> None:
        weight = self._count(node.node)
        if isinstance(node.target, nodes.Name):
            name, loop = node.target.name, self._loop_here()
            if name in self._weights:
                known, where = self._weights[name]
                if where is not loop:
                    known, weight = known.outside(), weight.outside()
                weight = known.or_else(weight)
            self._weights[name] = (weight, loop)
            self._origins.setdefault(name, set()).add(self._origin(node.node) or "")
        elif isinstance(node.target, nodes.NSRef):
            name = node.target.name
            known = self._weights.get(name, (_Weight(), None))[0]
            self._weights[name] = (known.outside() + weight.outside(), None)
        else:
            raise _refused(node.lineno, "several names set at once")

    def _loop_here(self) -> _Loop | None:
        return self._loops[-1] if self._loops else None

    def _loop(self, node: nodes.For) -> None:
        origin = self._origin(node.iter)
        inner = self._loop_here()
        if origin is None or len(self._loops) == _MAX_LOOPS:
            raise _refused(
                node.lineno, "a loop over something else or loops too deep in each other"
            )
        if origin in _ROOTS:
            if len(self._loops) > 1 or any(loop.root == origin for loop in self._loops):
                raise _refused(node.lineno, f"a loop over {origin} in another one over them")
            self._crosses |= bool(self._loops)
            root = origin
        elif inner is not None and origin in inner.names:
            root = inner.root
            self._loops_parts = True
            self._loops_parts_each |= len({loop.root for loop in self._loops}) > 1
        else:
            raise _refused(
                node.lineno, f"a loop over {origin!r}, which is no part of the loop around"
            )
        names = frozenset(name.name for name in _names_of(node.target))
        self._count(node.iter)
        for name in names:
            if name in self._weights or any(name in loop.names for loop in self._loops):
                raise _refused(node.lineno, f"a second meaning for {name!r}")
        self._loops.append(_Loop(root, names))
        if node.test is not None:
            self._count(node.test)
        self.block(node.body)
        self._loops.pop()
        self.block(node.else_)

    def _origin(self, expression: nodes.Node) -> str | None:
        """Return messages, tools or the loop's name that a list is a part of."""
        node = expression
        while not isinstance(node, nodes.Name):
            is_listed = isinstance(node, nodes.Filter) and node.name in _LOOPED_FILTERS
            is_slice = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
            if is_listed or is_slice or _part_of(node) in _LOOPED_PARTS:
                node = _inside(node)
            elif isinstance(node, nodes.Call) and _part_of(node.node) in _ENTRIES:
                node = _inside(node.node)
                while _part_of(node) is not None:
                    node = _inside(node)
            else:
                return None  # what split makes is as long as text
        known = self._origins.get(node.name)
        if known is None:
            return node.name
        origins = known | ({node.name} if node.name in _ROOTS else set())
        return next(iter(origins)) if len(origins) == 1 and "" not in origins else None

    def _weight(self, node: nodes.Node) -> _Weight:
        if isinstance(node, nodes.TemplateData):
            return _Weight(literal=len(node.data))
        if isinstance(node, nodes.Const):
            return _Weight(literal=len(str(node.value)))
        if isinstance(node, nodes.Name):
            inner = self._loop_here()
            if node.name in self._weights:
                weight, loop = self._weights[node.name]
                return weight if loop is inner else weight.outside()
            is_part = inner is not None and node.name in inner.names
            return _Weight(part=1) if is_part else _Weight(whole=0 if node.name == "loop" else 1)
        if _is_quick(node):
            return _Weight()
        total = _Weight()
        for child in node.iter_child_nodes():
            total += self._weight(child)
        if isinstance(node, nodes.Filter):
            total = total.times(_INDENTED if node.kwargs and node.name == "tojson" else 1)
            total = total.times(_FILTERS[node.name])
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
            total = total.times(_METHODS[node.node.attr])
        return total


_RESERVED = frozenset((*_ROOTS, *_FUNCTIONS, "loop"))


def _check_filter(node: nodes.Filter) -> None:
    if node.name not in _FILTERS or node.node is None:
        raise _refused(node.lineno, f"the filter {node.name!r}")
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _refused(node.lineno, f"the filter {node.name!r} with arguments from a list")
    keywords = {str(pair.key): pair.value for pair in node.kwargs}
    if not _ARGUMENTS.get(node.name, _any_arguments)(node.args, keywords):
        raise _refused(node.lineno, f"the filter {node.name!r} with such arguments")


Keywords = dict[str, nodes.Expr]


def _any_arguments(_args: list[nodes.Expr], _keywords: Keywords) -> bool:
    return True


def _json_arguments(args: list[nodes.Expr], keywords: Keywords) -> bool:
    """Tell whether each line begins with few spaces."""
    indent = keywords.get("indent", nodes.Const(0))
    is_few = isinstance(indent, nodes.Const) and _is_number(indent) and indent.value <= _MAX_INDENT
    ascii_only = keywords.get("ensure_ascii", nodes.Const("false"))
    is_known = not args and keywords.keys() <= {"indent", "ensure_ascii"}
    return is_known and is_few and isinstance(ascii_only, nodes.Const)


def _join_arguments(args: list[nodes.Expr], keywords: Keywords) -> bool:
    return not keywords and all(map(_is_short, args))


def _replace_arguments(args: list[nodes.Expr], keywords: Keywords) -> bool:
    """Tell whether one character becomes few."""
    return len(args) == len(("old", "new")) and _join_arguments(args, keywords)


def _map_arguments(args: list[nodes.Expr], keywords: Keywords) -> bool:
    """Tell whether no other filter is named."""
    return not args and keywords.keys() == {"attribute"}


def _select_arguments(args: list[nodes.Expr], keywords: Keywords) -> bool:
    test = args[1] if len(args) > 1 else nodes.Const("true")
    return not keywords and isinstance(test, nodes.Const) and test.value in {*_TESTS, "==", "!="}


_ARGUMENTS: dict[str, Callable[[list[nodes.Expr], Keywords], bool]] = {
    "join": _join_arguments,
    "map": _map_arguments,
    "rejectattr": _select_arguments,
    "replace": _replace_arguments,
    "selectattr": _select_arguments,
    "tojson": _json_arguments,
}


def _check_call(node: nodes.Call) -> None:
    called = node.node
    if node.dyn_args is not None or node.dyn_kwargs is not None:
        raise _refused(node.lineno, "a call with arguments from a list")
    if isinstance(called, nodes.Name) and called.name in _FUNCTIONS:
        if called.name == "namespace" and node.args:
            raise _refused(node.lineno, "a 'namespace' of something else than its fields")
        if called.name == "strftime_now" and not all(map(_is_short, node.args)):
            raise _refused(node.lineno, "'strftime_now' with such arguments")
    elif not (isinstance(called, nodes.Getattr) and called.attr in _METHODS):
        name = getattr(called, "name", getattr(called, "attr", "an expression"))
        raise _refused(node.lineno, f"a call of {name!r}")


def _is_number(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Const) and isinstance(node.value, int) and abs(node.value) < 2**31


def _is_short(node: nodes.Node) -> bool:
    return (
        isinstance(node, nodes.Const)
        and isinstance(node.value, str)
        and len(node.value) <= _LONGEST_REPLACEMENT
    )


def _is_count(node: nodes.Node) -> bool:
    """Tell whether a field stays a number: it is one, or a field with one added."""
    if isinstance(node, nodes.Add | nodes.Sub):
        return isinstance(node.left, nodes.Getattr) and _is_number(node.right)
    return _is_number(node)


def _is_field(node: nodes.Assign) -> bool:
    return isinstance(node.target, nodes.NSRef)


def _key(target: nodes.Node) -> tuple[str, str]:
    assert isinstance(target, nodes.NSRef)
    return target.name, target.attr


def _is_namespace(node: nodes.Node) -> bool:
    called = node.node if isinstance(node, nodes.Call) else None
    return isinstance(called, nodes.Name) and called.name == "namespace"


def _namespaces(tree: nodes.Template) -> set[str]:
    """Return the names of namespaces, which mean nothing else.

    Raises: AdapterMismatchError: one does.
    """
    assigned = list(tree.find_all(nodes.Assign))
    named = {
        node.target.name
        for node in assigned
        if isinstance(node.target, nodes.Name) and _is_namespace(node.node)
    }
    for node in assigned:
        target = node.target
        if isinstance(target, nodes.NSRef) and target.name not in named:
            raise _refused(node.lineno, f"a field of {target.name!r}, which is no 'namespace'")
        if isinstance(target, nodes.Name) and target.name in named and not _is_namespace(node.node):
            raise _refused(node.lineno, f"another meaning for {target.name!r}")
    return named


def _values(tree: nodes.Template, name: str, field: str) -> Iterator[nodes.Node]:
    """Return what a namespace's field is ever set to."""
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.NSRef) and _key(node.target) == (name, field):
            yield node.node
        elif isinstance(node.target, nodes.Name) and node.target.name == name:
            made = node.node
            assert isinstance(made, nodes.Call)
            yield from (pair.value for pair in made.kwargs if pair.key == field)


def _has(some: Sequence[nodes.Node], node: nodes.Node) -> bool:
    """Tell by identity: jinja's nodes are equal if they look so."""
    return any(other is node for other in some)


def _is_answer(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Not | nodes.Compare | nodes.Test) and not _builds(node)


def _names_in(node: nodes.Node) -> set[str]:
    return {name.name for name in _names_of(node)}


def _is_quick(node: nodes.Node) -> bool:
    """Tell whether a question is answered at once, however long is what it is about.

    Two lists or texts are compared item by item, and one is searched for another.
    """
    if _builds(node):
        return False
    match node:
        case nodes.Not():
            return _is_quick(node.node) or not isinstance(node.node, _QUESTIONS)
        case nodes.Test():
            return node.name not in _SLOW_TESTS
        case nodes.Compare():
            sides = [node.expr, *(operand.expr for operand in node.ops)]
            is_equality = all(operand.op in ("eq", "ne") for operand in node.ops)
            return is_equality and any(isinstance(side, nodes.Const) for side in sides)
    return False


_QUESTIONS = (nodes.Not, nodes.Compare, nodes.Test, nodes.And, nodes.Or)
_SLOW_TESTS = frozenset({"eq", "equalto", "in", "ne"})


def _builds(node: nodes.Node) -> bool:
    return isinstance(node, _BUILDING) or next(node.find_all(_BUILDING), None) is not None


def _part_of(node: nodes.Node) -> str | None:
    """Return which field of something an expression is."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return None


def _inside(node: nodes.Node) -> nodes.Node:
    """Return what a filter, a slice or a field is of."""
    inner = node.node  # type: ignore[attr-defined]
    assert isinstance(inner, nodes.Node)
    return inner


def _names_of(target: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(target, nodes.Name):
        yield target
    yield from target.find_all(nodes.Name)


def _descendants(node: nodes.Node) -> Iterator[nodes.Node]:
    for child in node.iter_child_nodes():
        yield child
        yield from _descendants(child)


@dataclass
class _Size:
    letters: int = 0
    entries: int = 0


def _size(value: object, depth: int) -> _Size:
    if depth > MAX_DEPTH:
        raise ValueError(f"messages or tools are nested more than {MAX_DEPTH} deep")
    if value is None or isinstance(value, str | int | float):
        return _Size(len(str(value)) + 4)
    if not isinstance(value, dict | list | tuple):
        raise TypeError(f"{type(value).__name__}: plain JSON is expected")
    size = _Size(4, len(value))
    for part in [*value, *value.values()] if isinstance(value, dict) else value:
        inner = _size(part, depth + 1)
        size.letters += inner.letters
        size.entries += inner.entries
    return size
