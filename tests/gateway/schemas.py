"""Random small JSON schemas that a grammar can enforce."""

from hypothesis import strategies as st

NAMES = st.sampled_from(["a", "b", "city name", "naïve", "x/y"])
TEXTS = st.sampled_from(["", "red", 'a "quoted" one', "two\nlines", "東京", "<b>", "</p>"])
SCALARS = st.one_of(TEXTS, st.integers(-9, 9), st.booleans(), st.none(), st.just(1.5))


@st.composite
def texts(draw):
    low = draw(st.integers(0, 3))
    schema = {"type": "string"}
    kind = draw(st.integers(0, 3))
    if kind == 1:
        schema |= {"minLength": low, "maxLength": low + draw(st.integers(0, 4))}
    if kind == 2:
        schema["pattern"] = draw(
            st.sampled_from(["^[a-c]{2,4}$", "[a-z]", "^(ab|cd)+$", r"^\d{3}-\w$", "[a-z]$", "a|b"])
        )
    if kind == 3:
        schema["format"] = draw(st.sampled_from(["date", "uuid", "ipv4", "no-such-format"]))
    return schema


@st.composite
def numbers(draw):
    schema = {"type": draw(st.sampled_from(["integer", "number"]))}
    low = draw(st.integers(-50, 50))
    if draw(st.booleans()):
        schema |= {"minimum": low, "maximum": low + draw(st.integers(0, 30))}
    else:
        schema |= {"exclusiveMinimum": low, "maximum": low + 7}
    return schema


def leaves():
    return st.one_of(
        texts(),
        numbers(),
        st.just({"type": "boolean"}),
        st.just({"type": ["string", "null"], "maxLength": 3}),
        st.builds(lambda value: {"const": value}, SCALARS),
        st.builds(lambda values: {"enum": values}, st.lists(SCALARS, min_size=1, max_size=4)),
        st.just({"$ref": "#/$defs/leaf"}),
        st.just({}),
    )


@st.composite
def arrays(draw, inner):
    low = draw(st.integers(0, 2))
    return {"type": "array", "items": draw(inner), "minItems": low, "maxItems": low + draw(st.integers(0, 2))}


@st.composite
def objects(draw, inner, num_max=3):
    properties = draw(st.dictionaries(NAMES, inner, max_size=num_max))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {
        "type": "object",
        "title": "dropped",
        "properties": properties,
        "required": required,
        "additionalProperties": draw(st.booleans()),
    }


def schemas():
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(arrays(inner), objects(inner), st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)),
        max_leaves=5,
    )


def rooted(schema):
    """The schema with the definitions that its references name."""
    return {**schema, "$defs": {"leaf": {"type": "string", "maxLength": 2, "description": "dropped"}}}
