#!/usr/bin/env python3
"""Chat templates, and what transformers makes of them: writes tests/data/templates.json.

    python3 -m venv venv && venv/bin/pip install transformers==5.24.0 jinja2
    venv/bin/python tests/tools/templates.py                     # the fixture
    venv/bin/python tests/tools/templates.py --all FILE.json OUT # other templates, a list of texts or an object of them

tests/templates.rs renders the same and compares byte for byte. Nothing in `make test` needs transformers.
"""

import datetime
import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import _compile_jinja_template

DATA = Path(__file__).parent.parent / "data"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
CONVERSATIONS = [
    [("user", "Hi")],
    [("system", "Be <b>brief</b>."), ("user", "What's \"that\"?\n")],
    [("system", " Be 'kind' "), ("user", "Hi & bye"), ("assistant", "<think>\nhm\n</think>\n\nHello, Wörld 🦀\t"), ("user", "- one\n- two")],
    [("user", "a"), ("user", "b")],
    [("assistant", "I begin")],
]

# Whole templates, of the kinds that models come with, rendered for all conversations.
WHOLE = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "alternating": "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "system first": "{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content'] | trim %}\n    {%- set loop_messages = messages[1:] %}\n{%- else %}\n    {%- set loop_messages = messages %}\n{%- endif %}\n\n{{- bos_token }}\n{%- for message in loop_messages %}\n    {%- if loop.first and system_message is defined %}\n        {{- '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' }}\n    {%- endif %}\n    {{- message.role | capitalize ~ ': ' ~ message['content'] | trim }}{{ '\\n' if not loop.last }}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '\\nAssistant:' }}\n{%- endif %}\n",
    "thinking left out": "{%- for message in messages %}\n{%- set content = message.content %}\n{%- if message.role == 'assistant' and '</think>' in content %}\n{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n{%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n{%- if loop.index0 > 5 %}{{- '<think>' + thought + '</think>' }}{%- endif %}\n{%- endif %}\n{{- '<|' ~ message.role ~ '|>' ~ content ~ '<|end|>\\n' }}\n{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}",
    "last query": "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == \"user\" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}{{ ns.last_query_index }} {{ ns.multi_step_tool }}",
    "tools asked for": "{%- if tools %}\n    {{- 'tools' }}\n{%- endif %}{%- if not tools is defined %}undefined{%- endif %}{%- if tools is none %}none{% endif %}{% if documents %}documents{% endif %}{% if tools is not none and tools|length > 0 %}!{% endif %}",
    "macro": "{%- macro render(content, upper=false) -%}\n{%- if content is string -%}{{ content.upper() if upper else content }}{%- else -%}{%- for item in content -%}{{ item.text }}{%- endfor -%}{%- endif -%}\n{%- endmacro -%}\n{%- for message in messages %}\n{{ message.role }}: {{ render(message.content, upper=loop.first) }}\n{%- endfor %}\n",
    "lines of their own": "{% for m in messages %}\n  {% if m.role == 'user' %}\nUser: {{ m.content }}\n  {% else %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}\nassistant:\n{% endif %}\n",
    "carriage returns": "{% for m in messages %}\r\n{{ m.role }}: {{ m.content }}\r\n{% endfor %}\r\nassistant:\r\n",
    "lone carriage returns": "a\rb\r\r\nc{{ 'x\ry' }}{{ '\\r' }}|\r",
    "generation": "{% for m in messages %}{% if m.role=='user' %}{{ 'User: ' + m.content + '\n' }}{% else %}{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}{{ 'Bot:' }}",
    "generation trimmed": "{%- for m in messages %}\n  {{- m.role }}\n  {%- generation -%}\n  {{ m.content }} \n  {%- endgeneration %}\n  x\n{% generation %}\n  {% set y = 1 %}{{ y }}\n{% endgeneration %}\n{% endfor %}{{ y is defined }}",
    "generation in a string": "{{ '{% generation %}' }}{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{%+ generation %} a {%+ endgeneration -%} b",
    "content in parts": "{%- for message in messages -%}{%- if message['content'] is string -%}{{ message['content'] }}{%- elif message['content'] is iterable and message['content'] is not mapping -%}parts{%- endif -%}|{%- endfor -%}",
    "break and continue": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{{ m.content }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "neighbours": "{% for m in messages %}{{ loop.previtem.role if loop.previtem is defined else '-' }}>{{ m.role }}>{{ loop.nextitem.role if not loop.last else '-' }} {{ loop.changed(m.role) }} {{ loop.revindex }}/{{ loop.length }};{% endfor %}",
    "grouped": "{% for role, group in messages|groupby('role') %}{{ role }}:{{ group|map(attribute='content')|join('+') }};{% endfor %}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|rejectattr('role', '==', 'user')|map(attribute='role')|join(',') }}",
    "messages as JSON": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ image_token }}[{{ unk_token }}]{{ pad_token is defined }}",
    "set block": "{% set text %}a{{ messages[0].content }}b{% endset %}{{ text|length }}{{ text }}",
    "filter block": "{% filter upper %}{{ messages[-1].content }}{% endfilter %}",
    "call block": "{% macro box(t) %}[{{ t }}:{{ caller() }}]{% endmacro %}{% call box('x') %}{{ messages[0].content }}{% endcall %}",
    "with": "{% with x = messages[0].content, y = 2 %}{{ x }}{{ y }}{% endwith %}{{ x is defined }}",
    "for else": "{% for m in messages if m.role == 'tool' %}{{ m }}{% else %}none{% endfor %}",
    "a message printed": "{{ messages[0] }} {{ messages[0].items()|list }} {{ messages[0].keys()|list }}",
}

# Expressions, each rendered once. Left out is what minijinja refuses by name: `%` on texts, `cycler`, `joiner`, `lipsum`, the filters
# `random`, `urlencode`, `urlize`, `xmlattr`, `pprint`, `filesizeformat`, `truncate` and `wordwrap`; and line ends escaped in a text.
EXPRESSIONS = [
    # tojson and its options
    "{'a': [1, 2.5, none, true], 'b': {'c': 'é<>&\\'\"\\\\/'}}|tojson",
    "{'a': [1, {'b': []}], 'c': {}}|tojson(indent=4)",
    "{'a': [1, {'b': []}], 'c': {}}|tojson(indent=0)",
    "{'a': 1, 'b': 2}|tojson(separators=(',', ':'))",
    "{'a': [1, 2], 'b': 2}|tojson(indent=1, separators=(' ,', ' = '))",
    "{'b': 1, 'a': {'d': 1, 'c': 2}}|tojson(sort_keys=true)",
    "'é🦀\\x07\\u2028\\x7f'|tojson",
    "'é🦀\\x07\\u2028\\x7f'|tojson(ensure_ascii=true)",
    "'a\\tb\\nc\\rd\\be\\ff'|tojson",
    "[1e20, 1e16, 1e15, 1e-5, 0.0001, 1.0, 123456789.125, -0.0, 1e100]|tojson",
    "{1: 'a', 2.5: 'b', true: 'c', none: 'd'}|tojson",
    "(1, 2)|tojson", "'x'|tojson(indent='\\t')", "[1,[2]]|tojson(indent='--')", "12345678901234567890|tojson", "[]|tojson(indent=2)", "undefined_thing|default('u')|tojson",
    # string methods
    "'abc'.upper() ~ 'ABC'.lower() ~ 'aBc dEf'.title() ~ 'aBc dEf'.capitalize() ~ 'aBc'.swapcase()",
    "'  a b '.strip() ~ '|' ~ '  a '.lstrip() ~ '|' ~ ' a  '.rstrip() ~ '|' ~ 'xxaxx'.strip('x') ~ '|' ~ 'abcab'.lstrip('ab') ~ '|' ~ 'abcba'.rstrip('ab')",
    "'a,b,,c'.split(',')", "' a  b '.split()", "'a,b,c'.split(',', 1)", "'a,b,c'.rsplit(',', 1)", "' a b c '.split(none, 1)", "'abc'.split('x')", "'a  b c'.rsplit()",
    "'a\\nb\\r\\nc\\n'.splitlines()", "'a\\nb\\n'.splitlines(true)", "''.splitlines()",
    "'prefix-x'.removeprefix('prefix-') ~ 'x.txt'.removesuffix('.txt') ~ 'abc'.removeprefix('z')",
    "'a=b=c'.partition('=')", "'a=b=c'.rpartition('=')", "'abc'.partition('x')", "'abc'.rpartition('x')",
    "'abcabc'.find('c') ~ 'abcabc'.rfind('c') ~ 'abc'.find('z') ~ 'abcabc'.index('b') ~ 'abcabc'.rindex('b')", "'abcabc'.find('c', 3)", "'éab'.find('b')",
    "'abcabc'.count('bc')", "'aXbXc'.replace('X', '-')", "'aXbXc'.replace('X', '-', 1)", "'abc'.replace('', '-')",
    "'abc'.startswith('ab') ~ 'abc'.endswith(('x', 'bc')) ~ 'abc'.startswith('b', 1) ~ 'abc'.startswith(())",
    "'-'.join(['a', 'b'])", "''.join(['a'])", "'{} {}'.format('a', 1)", "'{0} {name}'.format('a', name='b')", "'{:>5}|{:<4}|{:03d}'.format('a', 'b', 7)", 
    "'7'.zfill(3) ~ '-7'.zfill(4) ~ 'a'.ljust(3, '.') ~ 'a'.rjust(3) ~ 'a'.center(4, '*')",
    "'a1'.isalnum() ~ 'a'.isalpha() ~ '12'.isdigit() ~ '12'.isdecimal() ~ ' '.isspace() ~ 'A'.isupper() ~ 'a'.islower() ~ 'Ab C'.istitle() ~ 'a'.isascii() ~ 'a_1'.isidentifier() ~ 'a'.isprintable()",
    "'Straße'.casefold() ~ 'a\\tb'.expandtabs(4)",
    # strings as sequences
    "'abc'[0] ~ 'abc'[-1] ~ 'abc'[1:] ~ 'abc'[::-1] ~ 'abcdef'[::2] ~ 'abc'[:-1] ~ 'éàü'[1]", "'abc' * 2", "'=' * 0", "'b' in 'abc'", "'abc'|list", "'abc'|length", "'abc'|reverse", "'cab'|sort|join", "'abc'|first ~ 'abc'|last",
    # printing as Python does
    "none", "true", "[true, none, 1.0, 'a', \"it's\", 'say \"x\"', 'it\\'s \"x\"', 'é\\n\\\\']", "{'a': 1, 'b': {'c': [none]}}", "(1, 2)", "(1,)", "()", "[]", "{}", "1e20", "1e16", "1e15", "1e-5", "0.0001", "1.0", "100000000000000000000.0", "3.14159265358979", "7 / 2", "4 / 2", "7 // 2", "-7 // 2", "-7 % 3", "2 ** 10", "2 ** -1", "2 ** 0.5", "1_000", "true + 1", "-3|abs", "7.0 // 2", "1.5 % 1",
    "true ~ none ~ 1.0 ~ [1]", "undefined_thing ~ 'x'", "'a' ~ 1", "['a'] + ['b']", "[1, 2] == [1, 2.0]", "1 == true", "'1' == 1", "not undefined_thing", "undefined_thing or 'd'", "'' or 'e'", "1 < 2 < 3", "'a' < 'b'", "'x' if false", "1 if none else 2",
    "range(3)|list", "range(5, 0, -2)|list", "dict(a=1, b='c')", "dict(a=1)|tojson", "range(3)|length",
    # lists and maps
    "[1, 2, 3][1:] ~ [1, 2, 3][-1] ~ [1, 2, 3][::-1]", "[3, 1, 2]|sort", "[3, 1, 2]|sort(reverse=true)", "['b', 'A', 'c']|sort", "['b', 'A']|sort(case_sensitive=true)", "[1, 2, 3]|sum", "[1, 1, 2]|unique|list", "[1, 2, 3, 4]|batch(2)|list", "[1, 2, 3]|slice(2)|list", "[[1], [2]]|map('first')|list", "[1, 2, 3]|select('odd')|list", "[1, 0, 2]|select|list", "[1, 2]|map('string')|list", "[{'a': 1}, {'a': 2}]|map(attribute='a')|list", "[{'b': 1}]|map(attribute='a', default='d')|list", "[1, 2, 1].count(1)", "['a', 'b'].index('b')", "[1, 2]|max ~ [1, 2]|min", "[[1, 2], [3]]|sum(start=[])",
    "{'b': 1, 'a': 2}|dictsort", "{'b': 1, 'a': 2}|items|list", "{'a': 1}.items()|list", "{'a': 1}.get('b', 'd') ~ {'a': 1}.get('b') ~ {'a': 1}.get('a')", "{'a': 1}.keys()|list", "{'a': 1}.values()|list", "'a' in {'a': 1}", "{'a': 1}|length", "{'a': 1}['a'] ~ {'a': 1}.a", "{'items': 5}['items']", "{'a': 1}.b is defined", "{'b': 2, 'a': 1}|list",
    # filters
    "'a b'|title ~ 'a'|upper ~ 'A'|lower ~ 'abc def'|capitalize", "' a '|trim ~ 'xax'|trim('x')", "'abc'|replace('b', 'x')", "'a\\nb\\n\\nc'|indent(2)", "'a\\nb'|indent(2, true)", "'a\\nb'|indent(first=true)", "'a\\n\\nb'|indent(2, blank=true)", "'<a href=\"x\">&\\''|e", "'<a>'|escape", "'<b>x</b>  y'|striptags", "'3'|int + 1", "'x'|int(7)", "'3.7'|float", "3.7|int", "'0x1f'|int(base=16)", "2.5|round ~ 3.5|round ~ 2.567|round(2) ~ 7|round", "2.1|round(method='ceil')", "1|string ~ true|string ~ none|string ~ [1]|string", "'a b c'|wordcount", "'a'|center(5)", "'x'|default('d') ~ undefined_thing|default('d') ~ ''|default('d', true) ~ none|default('d', true) ~ none|d('x')", "'%s-%s'|format('a', 1)", "[1, 2]|join(', ')", "[{'n': 'a'}, {'n': 'b'}]|join('-', attribute='n')", "'abc'|safe", "[1, 2]|first ~ []|first is defined",
    # tests
    "1 is number ~ 'a' is string ~ [] is sequence ~ {} is mapping ~ 'a' is iterable ~ 1 is iterable", "none is none ~ true is true ~ false is false ~ true is boolean ~ 1 is integer ~ 1.0 is float ~ true is number", "1 is odd ~ 2 is even ~ 6 is divisibleby(3)", "1 is eq(1) ~ 1 is ne(2) ~ 1 is lt(2) ~ 2 is ge(2) ~ 1 is in([1])", "'a' is lower ~ 'A' is upper ~ 'a' is callable ~ 'upper' is filter ~ 'odd' is test", "{} is sequence ~ 'a' is sequence ~ (1,2) is sequence ~ range(2) is sequence", "x is undefined ~ x.y is undefined" ,"'a' is sameas('a') ~ none is sameas(none)", "[] is mapping ~ 'a' is mapping", "1 is not none", "'a' is escaped",
    # statements around them
    "namespace(a=1).a", "strftime_now is defined", "raise_exception is defined", "messages is defined", "add_generation_prompt", "tools", "loop is defined",
    # literals
    "'a' 'b'", "\"\\u00e9\\x41\\n\\101\"|length", "'\\z'", "0x1F ~ 0b11 ~ 0o17", "1.5e3", "[1, 2, ]", "{'a': 1, }", "True ~ False ~ None", "(1 if true else 2) ~ (3)", "messages[0]['role'] ~ messages[0].role", "messages|length", "messages[-1].content", "messages[5] is defined", "messages[0].missing is defined", "messages[0]['missing']|length",
]

# What Python does to these is an error, and is to be one.
REFUSED = [
    "{{ raise_exception('no') }}", "{{ 'a' + 1 }}", "{{ undefined_thing.x }}", "{{ undefined_thing + 'x' }}", "{{ messages.append(1) }}", "{{ messages[0].update({'a': 1}) }}", "{% if %}", "{{ 'a'", "{% for m in messages %}", "{{ 'a'|nosuchfilter }}", "{{ ''.__class__ }}{{ ''.__class__.__mro__ }}", "{{ 'a' is nosuchtest }}", "{{ 'abc'.nosuchmethod() }}", "{{ 'abc'.index('z') }}", "{{ 1 / 0 }}", "{{ {}['a']['b'] }}", "{% set ns = namespace() %}{{ ns.a.b }}", "{% generation %}", "{% endgeneration %}", "{{ none.x.y }}", "{{ undefined_thing() }}", "{{ none + 'a' }}", "{{ none|length }}",
]

DATES = [datetime.datetime(2026, 11, 28, 7, 5, 9, 42), datetime.datetime(2000, 2, 29, 12, 16, 34), datetime.datetime(2024, 12, 30, 0, 0, 0), datetime.datetime(1999, 1, 1, 23, 59, 59, 999999)]
FORMATS = ["%d %b %Y", "%A, %Y-%m-%d %H:%M:%S", "%B %d, %y%%", "%-d %B %Y", "%e|%_d|%-m|%-H|%-I|%-M|%k|%l", "%I:%M %p", "%P", "%j %U %W %V %G %g %u %w", "%a %h", "%c", "%x %X", "%D %F %T %R %r", "%C", "%f", "[%z%Z]", "%n%t|", "%y-%Y", "%^a %^B %#p", "%10Y|%05d|%_5m|%3d", "%", "100%", "%%d", "%q %! %é", "%Ey %Od %E", "heute: %A é", ""]


def conversation(turns):
    return [{"role": role, "content": content} for role, content in turns]


def render(template, turns, prompt):
    # As a tokenizer opens a template file: in text mode.
    template = template.replace("\r\n", "\n").replace("\r", "\n")
    try:
        compiled = _compile_jinja_template(template)
        return {"text": compiled.render(messages=conversation(turns), tools=None, documents=None, add_generation_prompt=prompt, **SPECIAL)}
    except Exception as error:
        return {"error": type(error).__name__}


def all_of(templates):
    return [
        {"name": name, "template": template, "messages": conversation(turns), "prompt": prompt, **render(template, turns, prompt)}
        for name, template in templates.items()
        for turns in CONVERSATIONS
        for prompt in (True, False)
    ]


def main():
    if sys.argv[1:2] == ["--all"]:
        templates = json.loads(Path(sys.argv[2]).read_text())
        if isinstance(templates, list):
            templates = {str(index): text for index, text in enumerate(templates)}
        Path(sys.argv[3]).write_text(json.dumps(all_of(templates), ensure_ascii=False))
        return
    cases = all_of(WHOLE)
    for text in ["{{ " + expression + " }}" for expression in EXPRESSIONS] + REFUSED:
        cases.append({"name": text, "template": text, "messages": conversation(CONVERSATIONS[2]), "prompt": True, **render(text, CONVERSATIONS[2], True)})
    # What prints where it is in memory is no case.
    cases = [case for case in cases if " object at 0x" not in case.get("text", "")]
    (DATA / "templates.json").write_text(json.dumps(cases, ensure_ascii=False, indent=0) + "\n")
    dates = [{"time": date.isoformat(), "format": form, "text": date.strftime(form)} for date in DATES for form in FORMATS]
    (DATA / "strftime.json").write_text(json.dumps(dates, ensure_ascii=False, indent=0) + "\n")


main()
