"""Somebody else's jinja template, run where it can do no harm and comes to an end.

Knows text and plain values, no dialog. The surprising thing: jinja2's sandbox keeps a template from
reaching Python's inside, but not from running or growing for ever. So the syntax tree gets a check
around whatever loops, joins, writes or makes values; every loop, call and piece of output of a
rendering is counted, and so is the size of every value.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import Environment, nodes, pass_context
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_LARGEST_TEMPLATE = 2**17  # characters; those of the widest use have up to 20,000
_STEPS = 100_000  # loop rounds, calls and pieces of output of one rendering
_SECONDS = 5.0
_LARGEST_VALUE = 2**20  # characters, beyond those that are given
_ITEM = 32  # characters that an item of a list counts for
_RANGE = 10_000
# What may be somebody's marks: Anatolian hieroglyphs, which are printable, so that a list or an
# object shows them as they are, and have no case; where all of them are used, private characters.
MARKS = (*range(0x14400, 0x14647), *range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
# What ensure_ascii escapes, but for these.
_ASCII = re.compile(r"[^\x00-\x7f\ue000-\uf8ff\U00014400-\U00014646\U000f0000-\U0010ffff]")


class BoundedTemplate:
    """A template that was parsed and compiled; ValueError where it is none, or is not run."""

    def __init__(self, source: str) -> None:
        if len(source) > _LARGEST_TEMPLATE:
            raise ValueError(
                f"the template has {len(source)} characters; more than {_LARGEST_TEMPLATE} are "
                "not read"
            )
        self._lock = threading.Lock()  # the budget is the environment's
        self._environment = _Environment()
        try:
            tree = _Bounded(self._environment).visit(self._environment.parse(source))
            self._code = self._environment.compile(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError,
                MemoryError) as error:  # fmt: skip
            raise ValueError(f"the template cannot be read: {_first_line(error)}") from error

    def render(self, values: Mapping[str, Any], *, size: int = 0, items: int = 0) -> str:
        """Render `values`, of which `size` characters in `items` lists or messages are expected.

        Raises ValueError with what the template says where it raises, or with what it does too much
        of.
        """
        environment = self._environment
        make = environment.template_class.from_code
        template = make(environment, self._code, environment.globals)
        with self._lock:
            environment.budget = _Budget(size, items)
            try:
                said = {"raise_exception": _raise, "strftime_now": _strftime_now}
                return "".join(template.generate({**values, **said}))
            except _Refusal as error:
                raise ValueError(f"the template says: {error}") from None
            except RecursionError:
                raise ValueError("the template calls itself too often") from None
            except Exception as error:  # it is somebody else's program: anything may happen
                raise ValueError(f"the template fails: {_first_line(error)}") from error


class _Refusal(Exception):
    """What the template itself raises."""


def _raise(message: object) -> None:
    raise _Refusal(f"{message!s:.200}")


def _strftime_now(form: object) -> str:
    if not isinstance(form, str) or re.fullmatch(r"(%-?[a-zA-Z%]|[^%]){0,40}", form) is None:
        raise ValueError(f"strftime_now({form!r:.60})")
    return datetime.now().strftime(form)


def _first_line(error: BaseException) -> str:
    return f"{str(error).splitlines()[0] if str(error) else type(error).__name__:.160}"


# --- bounds ---------------------------------------------------------------------------------------


class _Budget:
    """What is left of one rendering's steps, time and output."""

    def __init__(self, size: int = 0, items: int = 0) -> None:
        self.size = _LARGEST_VALUE + 2 * size + 20 * _ITEM * items
        self.steps = _STEPS + 100 * items
        self.output = 4 * self.size
        self.until = time.monotonic() + _SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise ValueError("it takes too many steps")
        if time.monotonic() > self.until:
            raise ValueError(f"it takes longer than {_SECONDS:g} s")

    def emit(self, size: int) -> None:
        self.step()
        self.output -= size
        if self.output < 0:
            raise ValueError("it writes too much")

    def check(self, *values: object) -> None:
        """ValueError where values are too large, a list's items counted wherever they occur."""
        self.step()
        left = self.size
        waiting = list(values)
        while waiting:
            value = waiting.pop()
            left -= _ITEM
            if isinstance(value, str):
                left -= len(value)
            elif isinstance(value, Mapping):
                waiting += value.keys()
                waiting += value.values()
            elif isinstance(value, Namespace):
                waiting += value._Namespace__attrs.values()
            elif isinstance(value, (list, tuple, set, frozenset)):
                waiting += value
            elif isinstance(value, int) and value.bit_length() > 256:
                raise ValueError("it counts too far")
            if left < _ITEM * len(waiting):
                raise ValueError("it makes too large a value")


class _Generation(Extension):
    """`{% generation %}` marks, for training, what the assistant says; here it does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Bounded(NodeTransformer):
    """A template's syntax tree with a check around whatever loops, joins, writes or makes lists."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def _through(self, name: str, node: nodes.Node) -> nodes.Expr:
        assert isinstance(node, nodes.Expr), node
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.For:
        if node.recursive:
            raise ValueError("it has a recursive loop")
        self.generic_visit(node)
        node.iter = self._through("_each", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Output:
        texts = [
            nodes.Const(each.data, lineno=each.lineno)
            if isinstance(each, nodes.TemplateData)
            else self.visit(each)
            for each in node.nodes
        ]
        node.nodes = [self._through("_emit", text) for text in texts]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("_concat", nodes.List(node.nodes, lineno=node.lineno))

    def _made(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return self._through("_check", node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Tuple = visit_Dict = _made

    def visit_Filter(self, node: nodes.Filter) -> nodes.Expr:
        self.generic_visit(node)
        if node.node is not None:
            node.node = self._through("_check", node.node)
        return self._through("_check", node)

    def _refuse(self, node: nodes.Node) -> None:
        raise ValueError(f"it has a {type(node).__name__.lower()} block, which is not run")

    visit_Include = visit_Import = visit_FromImport = visit_Extends = visit_Block = _refuse
    visit_FilterBlock = visit_ScopedEvalContextModifier = visit_EvalContextModifier = _refuse


_STR_METHODS = (
    "capitalize", "count", "endswith", "find", "isalpha", "isdigit", "islower", "isspace",
    "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "title", "upper",
)  # fmt: skip
_METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "sum", "title",
    "trim", "unique", "upper",
)  # fmt: skip


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with few filters and methods, each of which the budget sees."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self) -> None:
        extensions: list[str | type[Extension]] = [_Generation, LoopControlExtension]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.budget = _Budget()
        self.globals = {"range": self._range, "namespace": Namespace, "dict": dict}
        own: dict[str, Callable[..., Any]] = {
            "_each": self._each,
            "_emit": self._emit,
            "_concat": self._concat,
            "_check": self._check,
            "join": self._join,
            "replace": self._replace,
            "tojson": self._tojson,
            "string": self._text,
        }
        self.filters = {name: self.filters[name] for name in _FILTERS} | own

    # ---- what the syntax tree was made to call

    @pass_context  # which also keeps it from being called at compile time
    def _each(self, context: Context, values: Iterable[object]) -> Iterator[object]:
        return self._counted(values)

    @pass_context
    def _emit(self, context: Context, value: object) -> str:
        text = self._text(value)
        self.budget.emit(len(text))
        return text

    @pass_context
    def _concat(self, context: Context, values: Sequence[object]) -> str:
        return "".join(map(self._text, values))

    @pass_context
    def _check(self, context: Context, value: object) -> object:
        self.budget.check(value)
        return value

    def _text(self, value: object) -> str:
        """str(value) where that is bounded: of text, numbers and lists of them."""
        self.budget.check(value)
        waiting = [value]
        while waiting:
            each = waiting.pop()
            if isinstance(each, Mapping):
                waiting += each.values()
            elif isinstance(each, (list, tuple)):
                waiting += each
            elif not isinstance(each, (str, int, float, Undefined, type(None))):
                raise ValueError(f"it writes a {type(each).__name__}")
        return str(value)

    # ---- what templates call

    def _counted(self, values: Iterable[object]) -> Iterator[object]:
        for value in values:
            self.budget.step()
            yield value

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        if len(numbers) > _RANGE:
            raise ValueError(f"range{bounds!r:.60} has more than {_RANGE} numbers")
        return numbers

    def _join(self, values: Iterable[object], d: str = "", attribute: str | None = None) -> str:
        items = [
            self._text(value if attribute is None else self.getattr(value, attribute))
            for value in self._counted(values)
        ]
        self.budget.check(*items, [d] * len(items))
        return self._text(d).join(items)

    def _replace(self, s: object, old: object, new: object, count: int | None = None) -> str:
        text, was, becomes = self._text(s), self._text(old), self._text(new)
        times = text.count(was)
        if times * len(becomes) > self.budget.size:
            raise ValueError("it makes too large a value")
        return text.replace(was, becomes, -1 if count is None else count)

    def _tojson(
        self,
        value: object,
        ensure_ascii: object = False,
        indent: object = None,
        separators: object = None,
        sort_keys: object = False,
    ) -> str:
        """As transformers has it: nothing is escaped for HTML, and all options may be given."""
        self.budget.check(value)
        if not (indent is None or (type(indent) is int and 0 <= indent <= 8)):
            raise ValueError(f"tojson(indent={indent!r:.20})")
        pair = tuple(separators) if isinstance(separators, (list, tuple)) else separators
        if pair is not None and not (
            type(pair) is tuple and len(pair) == 2 and all(type(p) is str for p in pair)
        ):
            raise ValueError(f"tojson(separators={separators!r:.20})")
        text = json.dumps(
            value,
            ensure_ascii=False,
            indent=indent,
            separators=pair,
            sort_keys=bool(sort_keys),
        )
        return _ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text) if ensure_ascii else text

    # ---- what the sandbox asks

    def wrap_str_format(self, value: Any) -> None:
        """No str.format, then: its widths have no bounds."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr.startswith("_"):
            return False
        owner = next((each for each in _METHODS if isinstance(obj, each)), None)
        if owner is not None:
            return attr in _METHODS[owner]
        return super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.budget.check(list(args), kwargs)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name in ("join", "replace"):
            if kwargs.keys() - {"_loop_vars", "_block_vars"}:
                raise ValueError(f"it gives {name} named arguments")
            own = __self._replace if name == "replace" else __self._joined_by
            return own(owner, *args)
        result = super().call(__context, __obj, *args, **kwargs)
        __self.budget.check(result)
        return result

    def _joined_by(self, d: str, values: Iterable[object]) -> str:
        return self._join(values, d)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
        if operator == "+" and not numbers:
            self.budget.check(left, right)
        elif not numbers:
            raise ValueError(f"{operator} is for numbers only")
        elif operator == "**" and not (abs(left) <= 2**20 and abs(right) <= 8):
            raise ValueError("it counts too far")
        result = super().call_binop(context, operator, left, right)
        self.budget.check(result)
        return result
