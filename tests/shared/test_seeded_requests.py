"""No test asks a model for a random answer. Over HTTP the temperature is 1.0 if a request does not set it.

The check reads the files that start a deployment. A gateway in the test's own process answers from a script.
"""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FIXTURES = {"deploy", "running"}
RESOURCES = {"completions", "messages", "responses"}
PROMPTS, BOUNDS = {"prompt", "messages", "input"}, {"max_tokens", "max_output_tokens"}


def starts_services(tree):
    """Whether a file starts services, by a fixture, by our own class, or by the command."""
    words = set()
    for node in ast.walk(tree):
        if (isinstance(node, ast.arg) and node.arg in FIXTURES) or (
            isinstance(node, ast.Name) and node.id == "Deployment"
        ):
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
    return "antefix_console" in words and not words.isdisjoint({"up", "serve"})


class Module:
    """A test file: its requests, and those whose answer would be random."""

    def __init__(self, source):
        self.tree = ast.parse(source)
        # By name: every value that is bound to it, and the return values of functions with that name.
        self.values = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._bind(target, node.value)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                returned = [each.value for each in ast.walk(node) if isinstance(each, ast.Return) and each.value]
                self.values.setdefault(node.name, []).extend(returned)

    def _bind(self, target, value):
        if isinstance(target, ast.Name):
            self.values.setdefault(target.id, []).append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for each, its in zip(target.elts, value.elts, strict=False):
                self._bind(each, its)

    def drawn(self):
        """Line numbers of requests whose answer would be random."""
        return sorted(node.lineno for node in ast.walk(self.tree) if self._asks(node) and not self._is_fixed(node))

    @staticmethod
    def _asks(node):
        if isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            return bool(keys & PROMPTS and keys & BOUNDS)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            return (
                node.func.attr in ("create", "stream") and isinstance(owner, ast.Attribute) and owner.attr in RESOURCES
            )
        return False

    def _is_fixed(self, node, depth=6):
        """Whether the expression sets a seed, or the temperature 0."""
        if depth == 0:
            return False
        if isinstance(node, ast.Dict):
            pairs = [(_value(key), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.Call):
            pairs = [(each.arg, each.value) for each in node.keywords]
        else:
            pairs = []
        # Its parts: `**those`, `{**these}`, `of(a)`, `one | another`.
        parts = [value for key, value in pairs if key is None or key == "extra_body"]
        if isinstance(node, ast.BinOp):
            parts += [node.left, node.right]
        name = node.func if isinstance(node, ast.Call) else node
        if isinstance(name, ast.Name):
            parts += self.values.get(name.id, [])
        return any(_fixes(*pair) for pair in pairs) or any(self._is_fixed(part, depth - 1) for part in parts)


def _value(node):
    return node.value if isinstance(node, ast.Constant) else node


def _fixes(name, value):
    return name == "seed" or (name == "temperature" and _value(value) == 0)


def test_requests_to_services_say_a_seed_or_no_temperature():
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        source = path.read_text()
        if "max_" in source and starts_services((module := Module(source)).tree):
            found += [f"{path.relative_to(TESTS.parent)}:{number}" for number in module.drawn()]
    assert not found, f"the answer is drawn: give the request a seed, or the temperature 0: {found}"


FIXED = """
FIRST = {"prompt": "x", "max_tokens": 3, "seed": 1}
def second(**more):
    return {"prompt": "x", "max_tokens": 3, "temperature": 0, **more}
client.completions.create(**FIRST)
client.chat.completions.create(**second(stream=True))
client.messages.stream(messages=[], extra_body={"seed": 7})
client.post("/v1/responses", json=FIRST | {"input": "x"})
"""


def test_requests_that_say_how_are_found_to():
    assert Module(FIXED).drawn() == []


@pytest.mark.parametrize(
    ("said", "drawn"), [('"seed": 1', [2, 5]), ('"temperature": 0', [4, 6]), ('"seed": 7', [7]), ("**FIRST", [5])]
)
def test_a_request_that_does_not_say_is_found(said, drawn):
    assert Module(FIXED.replace(said, '"user": "me"' if said[0] == '"' else 'user="me"')).drawn() == drawn


@pytest.mark.parametrize(
    "source", ["def test_x(running): ...", "Deployment(config)", 'run("-m", "antefix_console", "serve", "kvstore")']
)
def test_a_file_that_starts_services_is_known(source):
    assert starts_services(ast.parse(source)) and not starts_services(ast.parse('running = "up"'))
