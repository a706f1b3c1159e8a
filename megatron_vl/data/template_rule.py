"""Whether a chat template does nothing with what people said but write it.

What else it does with a text, it may do to some texts and not to others, so what it writes around
them could not be remembered. The rule knows what is safe; all else counts as doubtful.
"""

from __future__ import annotations

from enum import IntEnum

import jinja2
from jinja2 import nodes


class Kind(IntEnum):
    """What a template's expression may be."""

    KNOWN = 0  # the same for all conversations of a shape: roles, types, counts, settings
    HOLDER = 1  # messages, a message, its content (a list) or a part of it (a dict)
    TEXT = 2  # what was said, alone or joined to something known


class _Doubt(Exception):
    """Something is done that may depend on a text."""


def only_writes_texts(source: str) -> bool:
    """Whether the Jinja template writes texts as they are, and decides nothing by them.

    Messages must be as `Turn.message` makes them: `role`, and `content` as a list of parts with
    `type` and, of texts, `text`.
    """
    try:
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        rule = _Rule({macro.name for macro in tree.find_all(nodes.Macro)})
        before = None
        while before != rule.names:  # a name may be set below where it is read
            before = dict(rule.names)
            rule.run(tree.body)
    except (_Doubt, jinja2.TemplateSyntaxError, RecursionError):  # syntax: tags of an extension
        return False
    return True


_CHANGING = {"strftime_now", "loop", "cycler", "joiner", "lipsum", "caller"}  # calls
_HOLD_ANYTHING = {"self", "loop", "varargs", "kwargs"}  # names
_SAFE_TESTS = {"string", "defined", "undefined", "none"}
_SAFE_HOLDER_TESTS = _SAFE_TESTS | {"mapping", "sequence", "iterable"}
_SAFE_HOLDER_FILTERS = {"first", "last", "list", "reverse"}
_FIXED = {"role", "type"}  # keys


class _Rule:
    def __init__(self, macros: set[str]):
        self.macros = macros
        self.names = {"messages": Kind.HOLDER}

    # ---- statements ---------------------------------------------------------------------------

    def run(self, body: list[nodes.Node]) -> None:
        for node in body:
            run = getattr(self, f"_run_{type(node).__name__.lower()}", None)
            if run is None:
                raise _Doubt
            run(node)

    def _run_output(self, node: nodes.Output) -> None:
        if any(self.kind(one) == Kind.HOLDER for one in node.nodes):
            raise _Doubt

    def _run_if(self, node: nodes.If) -> None:
        self._decide(node.test)
        known = self._truth(node.test)
        if known is not False:
            self.run(node.body)
        if known is not True:
            self.run([*node.elif_, *node.else_])

    def _run_for(self, node: nodes.For) -> None:
        over = self.kind(node.iter)
        if node.recursive or over == Kind.TEXT:
            raise _Doubt
        targets = node.target.items if isinstance(node.target, nodes.Tuple) else [node.target]
        if over == Kind.HOLDER and len(targets) > 1:
            raise _Doubt
        for target in targets:
            self._bind(target.name, over)
        if node.test is not None:
            self._decide(node.test)
        self.run([*node.body, *node.else_])

    def _run_assign(self, node: nodes.Assign) -> None:
        kind = self.kind(node.node)
        if isinstance(node.target, nodes.Name) and kind != Kind.TEXT:
            self._bind(node.target.name, kind)
        elif not isinstance(node.target, nodes.NSRef) or kind != Kind.KNOWN:
            raise _Doubt

    def _run_macro(self, node: nodes.Macro) -> None:
        self._all_known(node.defaults)
        for argument in node.args:
            self._bind(argument.name, Kind.HOLDER)
        self.run(node.body)

    def _run_break(self, node: nodes.Node) -> None:
        pass

    def _run_continue(self, node: nodes.Node) -> None:
        pass

    def _bind(self, name: str, kind: Kind) -> None:
        if name in self.macros:
            raise _Doubt
        self.names[name] = max(kind, self.names.get(name, Kind.KNOWN))

    def _decide(self, test: nodes.Expr) -> None:
        if self.kind(test) == Kind.TEXT:
            raise _Doubt

    def _truth(self, test: nodes.Expr) -> bool | None:
        """Of a test that has one answer: a holder is never a string."""
        if isinstance(test, nodes.Not):
            inner = self._truth(test.node)
            return None if inner is None else not inner
        holds = isinstance(test, nodes.Test) and self.kind(test.node) == Kind.HOLDER
        # Macros are called with what is no holder, too.
        if holds and test.name == "string" and not isinstance(test.node, nodes.Name):
            return False
        return None

    # ---- expressions --------------------------------------------------------------------------

    def kind(self, node: nodes.Expr) -> Kind:
        """Raises _Doubt: it may depend on a text otherwise than by being it."""
        kind = getattr(self, f"_kind_{type(node).__name__.lower()}", None)
        if kind is not None:
            return kind(node)
        if not isinstance(node, nodes.Expr):
            raise _Doubt
        self._all_known(node.iter_child_nodes())
        return Kind.KNOWN

    def _all_known(self, children) -> None:
        for child in children:
            if self.kind(child) != Kind.KNOWN:
                raise _Doubt

    def _kind_templatedata(self, node: nodes.TemplateData) -> Kind:
        return Kind.KNOWN

    def _kind_name(self, node: nodes.Name) -> Kind:
        if node.name in self.macros or node.name in _HOLD_ANYTHING:
            raise _Doubt  # under another name a macro's calls would not be seen
        return self.names.get(node.name, Kind.KNOWN)

    def _kind_getattr(self, node: nodes.Getattr) -> Kind:
        if isinstance(node.node, nodes.Name) and node.node.name == "loop":
            return Kind.HOLDER if node.attr in ("previtem", "nextitem") else Kind.KNOWN
        return self._of_key(self.kind(node.node), node.attr)

    def _kind_getitem(self, node: nodes.Getitem) -> Kind:
        holder = self.kind(node.node)
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            return self._of_key(holder, node.arg.value)
        self._all_known([node.arg])
        if holder == Kind.TEXT or (holder == Kind.HOLDER and not _is_place(node.arg)):
            raise _Doubt
        return holder

    def _of_key(self, holder: Kind, key: str) -> Kind:
        if holder == Kind.TEXT:
            raise _Doubt
        if holder == Kind.KNOWN or key in _FIXED:
            return Kind.KNOWN
        # Other keys are in no message: undefined, or a method that `_kind_call` knows or doubts.
        return {"text": Kind.TEXT, "content": Kind.HOLDER}.get(key, Kind.KNOWN)

    def _kind_call(self, node: nodes.Call) -> Kind:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise _Doubt
        arguments = [*node.args, *(keyword.value for keyword in node.kwargs)]
        called = node.node
        if isinstance(called, nodes.Name) and called.name in self.macros:
            kinds = [self.kind(one) for one in arguments]
            if Kind.TEXT in kinds:
                raise _Doubt
            return Kind.TEXT if Kind.HOLDER in kinds else Kind.KNOWN
        self._all_known(arguments)
        if isinstance(called, nodes.Name):
            if called.name in _CHANGING or self.kind(called) != Kind.KNOWN:
                raise _Doubt
            return Kind.KNOWN
        if not isinstance(called, nodes.Getattr):
            raise _Doubt
        holder = self.kind(called.node)
        if holder == Kind.KNOWN:
            return Kind.KNOWN
        key = node.args[0] if node.args else None
        if holder == Kind.HOLDER and called.attr == "get" and isinstance(key, nodes.Const):
            return self._of_key(holder, str(key.value))
        raise _Doubt

    def _kind_filter(self, node: nodes.Filter) -> Kind:
        if node.node is None or node.name == "random":
            raise _Doubt
        kind = self.kind(node.node)
        self._all_known([*node.args, *(keyword.value for keyword in node.kwargs)])
        if node.dyn_args is not None or node.dyn_kwargs is not None or kind == Kind.TEXT:
            raise _Doubt
        if kind == Kind.KNOWN or node.name in ("length", "count"):
            return Kind.KNOWN
        by = node.args[0] if node.args else None
        by_fixed = isinstance(by, nodes.Const) and by.value in _FIXED
        if node.name in _SAFE_HOLDER_FILTERS or (
            node.name in ("selectattr", "rejectattr") and by_fixed
        ):
            return Kind.HOLDER
        raise _Doubt

    def _kind_test(self, node: nodes.Test) -> Kind:
        kind = self.kind(node.node)
        self._all_known(node.args)
        safe = {Kind.TEXT: _SAFE_TESTS, Kind.HOLDER: _SAFE_HOLDER_TESTS}
        if kind in safe and node.name not in safe[kind]:
            raise _Doubt
        return Kind.KNOWN

    def _kind_compare(self, node: nodes.Compare) -> Kind:
        (first, *more) = (node.expr, *(one.expr for one in node.ops))
        kinds = [self.kind(one) for one in (first, *more)]
        asks_for_key = [one.op for one in node.ops] in (["in"], ["notin"]) and isinstance(
            first, nodes.Const
        )
        if Kind.TEXT in kinds or (Kind.HOLDER in kinds and not asks_for_key):
            raise _Doubt
        return Kind.KNOWN

    def _kind_condexpr(self, node: nodes.CondExpr) -> Kind:
        self._decide(node.test)
        known = self._truth(node.test)
        ways = [] if known is False else [node.expr1]
        if known is not True and node.expr2 is not None:
            ways.append(node.expr2)
        kinds = {self.kind(one) for one in ways} - {Kind.KNOWN}
        if len(kinds) > 1:
            raise _Doubt
        return kinds.pop() if kinds else Kind.KNOWN

    def _kind_and(self, node: nodes.And) -> Kind:
        kinds = self.kind(node.left), self.kind(node.right)
        if Kind.TEXT in kinds:
            raise _Doubt
        return max(kinds)

    _kind_or = _kind_and

    def _kind_not(self, node: nodes.Not) -> Kind:
        self._decide(node.node)
        return Kind.KNOWN

    def _kind_concat(self, node: nodes.Concat) -> Kind:
        kinds = [self.kind(one) for one in node.nodes]
        if Kind.HOLDER in kinds:
            raise _Doubt
        return max(kinds)

    def _kind_add(self, node: nodes.Add) -> Kind:
        kinds = self.kind(node.left), self.kind(node.right)
        if Kind.HOLDER in kinds:
            raise _Doubt
        return max(kinds)


def _is_place(index: nodes.Expr) -> bool:
    """Whether a subscript is a number or a range, and so no key."""
    if isinstance(index, nodes.Slice):
        return True
    if isinstance(index, (nodes.Add, nodes.Sub)):
        return _is_place(index.left) and _is_place(index.right)
    if isinstance(index, nodes.Neg):
        return _is_place(index.node)
    if isinstance(index, nodes.Const):
        return isinstance(index.value, int)
    return (isinstance(index, nodes.Getattr) and isinstance(index.node, nodes.Name)
            and index.node.name == "loop" and "index" in index.attr)
