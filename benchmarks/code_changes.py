"""What changed between two versions of a source file in what its code does.

Two versions count as equal if they differ only in comments, docstrings, layout, the order of functions, help texts,
messages of errors and logs, annotations that nothing reads at run time, and imports that only such annotations use. A
function that the file did not have before changes nothing by itself: code that calls it has changed too.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator

# Names of the logging methods whose first argument is a message.
LOGS = {"debug", "info", "warning", "error", "exception", "critical"}
# Annotations of functions with other decorators may matter at run time: Triton's tl.constexpr is one.
_PLAIN_DECORATORS = {
    *("property", "staticmethod", "classmethod", "setter", "override", "abstractmethod", "overload"),
    *("cache", "lru_cache", "cached_property", "contextmanager", "asynccontextmanager"),
}
# Modules whose import does nothing, so that only what is used of them counts.
_TYPES = {"__future__", "collections.abc", "typing", "types"}
_COMMENT = re.compile(r"^\s*//[^\n]*\n?|[ \t]+//[^\n]*", re.MULTILINE)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_DEFINITIONS = (ast.ClassDef, *_FUNCTIONS)


def changed_parts(name: str, before: str, after: str) -> list[str]:
    """The top-level functions and classes that differ, and "module" if other code does. For files that are not Python
    the list has the file's name, or is empty.

    Raises:  SyntaxError: a Python file cannot be read.
    """
    if not name.endswith(".py"):
        bare = [_COMMENT.sub("", text) if name.endswith(".proto") else text for text in (before, after)]
        return [name] if bare[0] != bare[1] else []
    old, new = parts(before), parts(after)
    differ = [part for part in {**old, **new} if old.get(part) != new.get(part)]
    known = set(re.findall(r"\w+", before))
    return [part for part in differ if not (part in _callable_parts(after) and part not in known)]


def parts(text: str) -> dict[str, str]:
    """The code of each top-level function and class, and under "module" all other code, without texts for readers."""
    tree = ast.parse(text)
    for_types = _Bare().strip(tree)
    found: dict[str, str] = {}
    imports = sorted(_imports(tree, for_types))
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            continue
        name = node.name if isinstance(node, _DEFINITIONS) else "module"
        found[name] = found.get(name, "") + ast.dump(node)
    found["module"] = "".join([*imports, found.get("module", "")])
    return found


def _callable_parts(text: str) -> set[str]:
    """Names of top-level functions that do nothing until they are called."""
    plain = (node for node in ast.parse(text).body if isinstance(node, _FUNCTIONS) and not node.decorator_list)
    return {node.name for node in plain if not node.name.startswith("__") and not hasattr(builtins, node.name)}


def _imports(tree: ast.Module, for_types: set[str]) -> Iterator[str]:
    """Each name that the module imports, except names that only removed annotations use."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = f"{'.' * node.level}{node.module or ''}" if isinstance(node, ast.ImportFrom) else ""
            for each in node.names:
                bound = (each.asname or each.name).split(".")[0]
                if bound in used or (bound not in for_types and source not in _TYPES):
                    yield f"import {source} {each.name} as {each.asname};"


class _Bare(ast.NodeTransformer):
    """Removes what only people and type checkers read."""

    def __init__(self) -> None:
        self._for_types: set[str] = set()
        self._in_class = False

    def strip(self, tree: ast.Module) -> set[str]:
        """Change the tree, and return the names that the removed annotations use."""
        self.visit(tree)
        return self._for_types

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.Module, *_DEFINITIONS)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        return super().generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        outer, self._in_class = self._in_class, True
        self.generic_visit(node)
        self._in_class = outer
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        outer, self._in_class = self._in_class, False
        if all(_last_name(decorator) in _PLAIN_DECORATORS for decorator in node.decorator_list):
            arguments = node.args
            every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
            for argument in every:
                if argument is not None:
                    argument.annotation = self._drop(argument.annotation)
            node.returns = self._drop(node.returns)
        self.generic_visit(node)
        self._in_class = outer
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self._in_class:  # dataclasses and settings read them
            return self.generic_visit(node)
        self._drop(node.annotation)
        if node.value is None:
            return None
        self.generic_visit(node)
        return ast.Assign(targets=[node.target], value=node.value)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        self.generic_visit(node)
        if _last_name(node.test) != "TYPE_CHECKING":
            return node
        return list(node.orelse)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.exc, ast.Call) and node.exc.args and _is_text(node.exc.args[0]):
            node.exc.args[0] = ast.Constant("")
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        for keyword in node.keywords:
            if keyword.arg in {"help", "description"} and _is_text(keyword.value):
                keyword.value = ast.Constant("")
        if isinstance(node.func, ast.Attribute) and node.func.attr in LOGS and node.args and _is_text(node.args[0]):
            node.args[0] = ast.Constant("")
        return node

    def _drop(self, annotation: ast.expr | None) -> None:
        if annotation is not None:
            self._for_types.update(re.findall(r"\w+", ast.unparse(annotation)))


def _last_name(node: ast.expr) -> str:
    """`lru_cache` of `functools.lru_cache(maxsize=1)`; empty for other expressions."""
    if isinstance(node, ast.Call):
        return _last_name(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    """Whether an expression is a text that the source spells out, with or without values in it."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.IfExp):
        return _is_text(node.body) and _is_text(node.orelse)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
