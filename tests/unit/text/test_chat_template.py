import json
import time

import pytest
from checkpoint_files import gpt2, qwen

from cluster.base.errors import ConfigError, InvalidRequestError
from replicas.text.chat_template import MAX_PROMPT_CHARS, ChatTemplate

USER = [{"role": "user", "content": "Hello"}]


def build(source, max_render_s=1.0, **variables):
    return ChatTemplate(source, ["<s>", "</s>"], variables, max_render_s=max_render_s)


def on_request(source):
    """A template that is harmless for the load-time probe and runs `source` for content 'go'."""
    return build("{% if messages[0].content == 'go' %}" + source + "{% endif %}", 0.2)


def test_no_template_is_none(tmp_path):
    assert ChatTemplate.from_directory(gpt2(tmp_path)) is None


def test_jinja_file_wins_over_config(tmp_path):
    path = qwen(tmp_path)
    (path / "chat_template.jinja").write_text("file:{{ messages[0].content }}")
    assert ChatTemplate.from_directory(path).render(USER) == "file:Hello"


def test_named_templates_use_the_default(tmp_path):
    path = qwen(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "rag", "template": "rag"},
        {"name": "default", "template": "default {{ eos_token }}"},
    ]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_directory(path).render(USER) == "default <|im_end|>"


def test_language_that_real_templates_use():
    template = build(
        "{{ bos_token }}{%- set ns = namespace(found=false, n=0) -%}"
        "{%- for m in messages if m.role != 'tool' -%}"
        "{%- set ns.n = ns.n + 1 -%}{%- if loop.first %}[{{ m.role|upper }}]{% endif -%}"
        "{{ m['content'].strip() ~ (' ' * 2) ~ m.content|length }}"
        "{%- if loop.index0 > 5 %}{% break %}{% endif -%}"
        "{%- endfor -%}"
        "{% macro tag(x) %}<{{ x }}>{% endmacro %}{{ tag('a') }}"
        "{% set block %}x{{ ns.n }}{% endset %}{{ block }}"
        "{% generation %}{{ [1, 'é'] | tojson }}{% endgeneration %}"
        "{{ messages | map(attribute='role') | join(',') }}"
        "{% if tools is none and documents is none %}{{ '%s-%d' % ('f', 3) }}{% endif %}"
        "{{ 'a,b'.split(',')[::-1] | join('') }}{{ 'abc'.replace('b', 'xx') }}",
        bos_token="<s>",
    )
    messages = [{"role": "user", "content": " hi "}, {"role": "tool", "content": "t"}]
    assert template.render(messages) == '<s>[USER]hi  4<a>x1[1, "é"]user,toolf-3baaxxc'


def test_strftime_now_prints_this_year():
    assert build("{{ strftime_now('%Y') }}").render(USER) == time.strftime("%Y")


def test_raise_exception_reaches_the_client():
    template = build("{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="Roles must alternate") as caught:
        template.render(USER)
    assert caught.value.param == "messages"


def test_template_fault_is_a_request_error():
    with pytest.raises(InvalidRequestError, match="TypeError"):
        build("{{ messages[0].content + 1 }}").render(USER)


@pytest.mark.parametrize("content", ["\ud800", "\ufdd1"])
def test_what_is_no_text_is_refused(content):
    with pytest.raises(InvalidRequestError, match=r"U\+"):
        build("{{ messages }}").render([{"role": "user", "content": content}])


def test_overlapping_and_single_character_control_strings_are_broken():
    template = ChatTemplate("{{ messages[0].content }}", ["ab", "bc", "\u25c6"], {})
    rendered = template.render([{"role": "user", "content": "abc \u25c6"}])
    assert rendered.replace("\ufdd1", "") == "abc \u25c6"
    assert "ab" not in rendered
    assert "bc" not in rendered
    assert "\u25c6\ufdd1" in rendered


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context }}",
    "{{ (messages|attr('__class__')).__base__ }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace(_x=1) %}",
    "{{ '{0.__class__}'.format(1) }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_escapes_render_nothing_of_the_interior(source):
    template = on_request(source)
    try:
        out = template.render([{"role": "user", "content": "go"}])
    except InvalidRequestError:
        return
    assert "class" not in out
    assert "object" not in out


def test_underscore_attribute_on_a_namespace_is_refused_at_load():
    with pytest.raises(ConfigError, match="underscore"):
        build("{% set ns = namespace() %}{% set ns.__x = 1 %}")


BOMBS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "nested loops without calls": "{% set l = [0] * 99999 %}{% for a in l %}{% for b in l %}"
    "{% endfor %}{% endfor %}",
    "loops in a macro": "{% macro f(n) %}{% for a in range(99999) %}{{ f(n) }}{% endfor %}"
    "{% endmacro %}{{ f(1) }}",
    "product": "{{ 'x' * 200000000 }}",
    "reversed product": "{{ 200000000 * 'x' }}",
    "list product": "{{ ([0] * 200000000) | length }}",
    "padding": "{{ 'x'.center(200000000) }}",
    "zfill": "{{ 'x'.zfill(200000000) }}",
    "filter padding": "{{ 'x' | center(200000000) }}",
    "indent": "{{ 'a\\nb' | indent(200000000) }}",
    "format": "{{ '{:>200000000}'.format('x') }}",
    "nested format": "{{ '{:>{}}'.format('x', 200000000) }}",
    "percent": "{{ '%200000000d' % 1 }}",
    "percent star": "{{ '%*d' % (200000000, 1) }}",
    "doubling by ~": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by block": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubling by replace": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('x', 'xx') %}{% endfor %}",
    "doubling by join": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "doubling by format": "{% set ns = namespace(x='x') %}{% for i in range(60) %}"
    "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "power tower": "{{ 9 ** (9 ** 9) }}",
    "long range": "{{ range(1000000000) | list }}",
    "wide output": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_quickly_at_load_and_at_render(name):
    start = time.thread_time()
    with pytest.raises(ConfigError, match="refused"):
        build(BOMBS[name], 0.2)
    with pytest.raises(InvalidRequestError, match="chat template"):
        on_request(BOMBS[name]).render([{"role": "user", "content": "go"}])
    assert time.thread_time() - start < 1.5


def test_largest_prompt_is_bounded():
    template = build("{{ messages[0].content }}{{ messages[0].content }}")
    content = "x" * (MAX_PROMPT_CHARS // 2)
    assert len(template.render([{"role": "user", "content": content}])) == MAX_PROMPT_CHARS
    with pytest.raises(InvalidRequestError, match="large"):
        template.render([{"role": "user", "content": content + "x"}])


def test_syntax_error_is_a_config_error():
    with pytest.raises(ConfigError, match="not valid"):
        build("{% for m in messages %}")


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x</s>": ["<s>", 1, None]}}}


def test_tools_are_shown_and_hold_no_control_token():
    template = build("{{ messages[0].content }}{% if tools %}{{ tools | tojson }}{% endif %}")
    assert template.takes_tools
    text = template.render(USER, tools=[TOOL])
    assert text.replace("\ufdd1", "") == "Hello" + json.dumps([TOOL])
    assert "<s>" not in text
    assert "</s>" not in text
    assert template.render(USER) == "Hello"


def test_calls_in_messages_are_json_for_the_template():
    template = build(
        "{% for m in messages %}{{ m.tool_calls[0].function.arguments.a }}{% endfor %}"
    )
    assert not template.takes_tools
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": "</s>"}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": (call,)}]
    assert template.render(messages) == "<\ufdd1/s>"


def test_a_template_of_its_own_for_tools(tmp_path):
    path = qwen(tmp_path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_directory(path)
    assert (template.render(USER), template.render(USER, tools=[TOOL])) == ("plain", "f")
    assert template.takes_tools
