"""A chat template is a foreign program. It may loop for ever or fill memory, and must not delay other requests."""

import pytest

from antefix.errors import InvalidRequest, ModelError
from antefix_router.chat.messages import ChatRole, Conversation, Message
from antefix_router.chat.template import TemplateFormat

pytestmark = pytest.mark.services
GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
FILL = "{% set n = namespace(t='x' * 1000) %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"
WIDE = "{{ messages[0].content.ljust(99999999999) }}"


def said(text):
    return Conversation(messages=(Message(role=ChatRole.USER, content=text),))


@pytest.fixture
def bounded(tmp_path):
    made = []

    def make(template):
        made.append(TemplateFormat(template, tmp_path, bounded=True))
        return made[-1]

    yield make
    for each in made:
        each._write.close()


def test_a_good_template_writes_the_same_in_its_process(bounded, tmp_path):
    here, apart = TemplateFormat(GOOD, tmp_path), bounded(GOOD)
    for text in ("hello", "ä" * 100_000, 'quote " and \n newline', ""):
        assert apart.render(said(text)) == here.render(said(text))


@pytest.mark.parametrize("harm", [LOOP, FILL, WIDE])
def test_what_takes_too_much_for_one_conversation_is_refused_and_others_are_written(bounded, harm):
    chat_format = bounded("{% if messages[0].content == 'bad' %}" + harm + "{% endif %}" + GOOD)
    right = chat_format.render(said("good"))
    with pytest.raises(InvalidRequest, match=r"takes more than 2 s, or too much memory|refuses this conversation"):
        chat_format.render(said("bad"))
    assert chat_format.render(said("good")) == right


@pytest.mark.parametrize("template", ["{% for %}", "{{ messages | nonsense }}"])
def test_what_does_not_compile_stops_the_start(bounded, template):
    with pytest.raises(ModelError, match="does not compile"):
        bounded(template)


def test_a_process_that_was_killed_is_started_again(bounded):
    chat_format = bounded(GOOD)
    right = chat_format.render(said("a"))
    chat_format._write._process.kill()
    chat_format._write._process.wait()
    assert chat_format.render(said("a")) == right
