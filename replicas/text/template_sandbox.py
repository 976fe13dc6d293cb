"""A Jinja environment in which a checkpoint's template cannot reach out, run long or grow large.

Jinja's immutable sandbox stops attribute escapes. On top of it every render has a budget: loop
rounds and calls are counted and the clock is read (a tick is compiled into each loop body), and
whatever can multiply text (`*`, `+`, `~`, `%`, formatting, padding, replace, join, captured blocks)
is checked before it is made. Names offered to templates follow transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from replicas.text.template_budget import RenderBudget, check_binop, check_filter, check_text_call

_GUARDED_FILTERS = ("center", "indent", "wordwrap", "format", "replace", "join", "batch", "slice")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox with budgets; set `budget` in the current context before a render."""

    intercepted_binops = frozenset({"*", "+", "%", "**"})

    def __init__(self) -> None:
        # Constant folding would run expressions while compiling, outside of any budget.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[loopcontrols, _GenerationTag],
        )
        self.budget: ContextVar[RenderBudget] = ContextVar("render_budget")
        for name in _GUARDED_FILTERS:
            self.filters[name] = self._guarded(name, self.filters[name])
        self.filters["tojson"] = _tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def tick(self) -> str:
        """Called by every loop round; prints nothing."""
        self.budget.get().tick()
        return ""

    def concat(self, pieces: Iterable[str]) -> str:
        """Join printed pieces, stopping as soon as they are too large."""
        budget = self.budget.get()
        kept: list[str] = []
        size = 0
        for piece in pieces:
            size += len(piece)
            budget.check_size(size)
            kept.append(piece)
        return "".join(kept)

    def join_values(self, *values: Any) -> str:
        """The `~` operator."""
        return self.concat(str(value) for value in values)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic whose result could be far larger than its operands."""
        check_binop(self.budget.get(), operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, target: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Every call is counted; text methods and namespaces are checked first."""
        budget = self.budget.get()
        budget.tick()
        # The sandbox hands out str.format wrapped; the bound method is inside.
        method = getattr(target, "__wrapped__", target)
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            check_text_call(budget, owner, getattr(method, "__name__", ""), args)
        if target is Namespace:
            _check_names(dict(*args, **kwargs))
        return super().call(context, target, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = Parser(self, source, name, filename).parse()
        _check_names(reference.attr for reference in tree.find_all(nodes.NSRef))
        bounded: nodes.Template = _Bounder().visit(tree)
        bounded.set_environment(self)
        return bounded

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        takes_environment = getattr(function, "jinja_pass_arg", None) is not None

        def guarded(*args: Any, **kwargs: Any) -> Any:
            plain = args[1:] if takes_environment else args
            check_filter(self.budget.get(), name, plain, kwargs)
            return function(*args, **kwargs)

        if takes_environment:
            guarded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return guarded


class _Bounder(NodeTransformer):
    """Puts a tick into every loop and makes `~` a bounded call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja dispatches by name
        self.generic_visit(node)
        node.body.insert(0, nodes.Output([_environment_call("tick", [])], lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 - as above
        self.generic_visit(node)
        return _environment_call("join_values", node.nodes)


class _GenerationTag(Extension):
    """`{% generation %}` marks training targets; when serving its body simply prints."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as an instance attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment_call(name: str, args: list[nodes.Expr]) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), args, [], None, None)


def _check_names(names: Iterable[Any]) -> None:
    # An underscore name in a namespace can shadow what the sandbox asks of an object.
    if any(str(name).startswith("_") for name in names):
        raise SecurityError("a chat template may not set names that begin with an underscore")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers prints it: no HTML escapes."""
    if indent is not None and indent > 64:
        raise SecurityError("too wide an indent")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
