"""Chained kernels: every kernel that is launched chained waits first, and other devices get plain launches."""

import ast
from pathlib import Path

import torch

import antefix_kernels
from antefix_kernels import chained

DIRECTORY = Path(antefix_kernels.__file__).parent


def test_a_kernel_that_is_launched_chained_waits_before_anything_else() -> None:
    texts = {path.name: path.read_text() for path in DIRECTORY.glob("*.py") if path.name != "chained.py"}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    functions = {
        node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    }
    launched = [
        call.func.value.id
        for tree in trees.values()
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and isinstance(call.func.value, ast.Name)
        and any(word.arg is None and "chained.options" in ast.unparse(word.value) for word in call.keywords)
    ]
    assert "_few_rows_kernel" in launched
    # No launch is written in a way that this test does not find.
    assert len(launched) == sum(text.count("chained.options(") for text in texts.values())
    for name in launched:
        body = functions[name].body
        first = body[1] if ast.get_docstring(functions[name]) else body[0]
        assert ast.unparse(first) == "follow(CHAINED)", name


def test_a_cpu_gets_plain_launches() -> None:
    assert chained.options(torch.zeros(1)) == {}
