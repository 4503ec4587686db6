"""The interpreter of Go templates, by what pkg.go.dev/text/template says of each construct."""

import pytest

from lite.errors import ExportError
from lite.export.go_template import execute, literal, ollama_prompt

TURNS = [{"Role": "user", "Content": "a"}, {"Role": "assistant", "Content": "b"}]
VALUES = {"System": "sys", "Empty": "", "Messages": TURNS, "Yes": True}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # "{{23 -}} < {{- 45}}" generates "23<45": the documentation's own example.
        ("{{23 -}} < {{- 45}}", "23<45"),
        ("a \n\t{{- /* a comment */ -}}\n b", "ab"),
        ("a{{/* {{ not read }} */}}b", "ab"),
        ("{{-3}}", "-3"),  # a minus is a trim marker only with a blank after it
        ("a {{.System}} b\n", "a sys b\n"),
        ('{{"\\"{{\\n"}}{{`}}"`}}', '"{{\n}}"'),
        # The empty values are false, 0, nil, and any string, list or map of length zero.
        ("{{if .System}}y{{else}}n{{end}}{{if .Empty}}y{{else}}n{{end}}{{if .Missing}}y{{else}}n{{end}}", "ynn"),
        ("{{if 0}}a{{else if .Empty}}b{{else if .Yes}}c{{else}}d{{end}}!", "c!"),
        ("{{with .System}}{{.}}{{end}}{{with .Empty}}a{{else}}b{{end}}", "sysb"),
        ("{{with $x := .System}}{{$x}}{{.}}{{end}}", "syssys"),
        ("{{range .Messages}}{{.Role}}:{{.Content}};{{end}}", "user:a;assistant:b;"),
        ("{{range $i, $m := .Messages}}{{$i}}{{$m.Content}}{{$.System}} {{end}}", "0asys 1bsys "),
        ("{{range $m := .Messages}}{{$m.Content}}{{end}}{{range .Missing}}x{{else}}none{{end}}", "abnone"),
        ("{{range .Messages}}{{if eq .Content `b`}}{{break}}{{end}}{{.Content}}{{end}}", "a"),
        ("{{range .Messages}}{{if eq .Content `a`}}{{continue}}{{end}}{{.Content}}{{end}}", "b"),
        # A variable set inside a branch by = is the outer one; one declared there by := ends with it.
        ("{{$x := 1}}{{if true}}{{$x = 2}}{{end}}{{$x}}{{if true}}{{$x := 3}}{{$x}}{{end}}{{$x}}", "232"),
        # "and x y" behaves as "if x then y else x"; what is behind the deciding argument is not looked at.
        ("{{and .Empty (index .Messages 9)}}|{{and 1 2}}|{{or .Empty `z`}}|{{or 1 (index .Messages 9)}}", "|2|z|1"),
        (
            "{{not .Empty}} {{eq 1 2 1}} {{ne `a` `b`}} {{lt 1 2}} {{le 2 2}} {{gt 1 2}} {{ge 1 2}}",
            "true " * 5 + "false " + "false",
        ),
        ("{{len .Messages}} {{len `é`}}", "2 2"),  # of a string in bytes
        ("{{(index .Messages 1).Content}} {{len (slice .Messages 1)}} {{slice `abcd` 1 3}}", "b 1 bc"),
        # A pipeline's value is the last argument of what follows.
        ("{{.System | len}} {{1 | eq 1 | not}} {{.Messages | len | lt 1}}", "3 false true"),
        ('{{print "a" 1 true}}', "a1true"),
        ("}} { {", "}} { {"),
    ],
)
def test_by_the_documentation(template: str, expected: str) -> None:
    """What documented rules give for small templates."""
    assert execute(template, VALUES) == expected


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{if .System}}", "end"),
        ("{{end}}", "nothing is open"),
        ("{{ .Missing }}", "not there"),
        ("{{ index .Messages 2 }}", "index"),
        ("{{ slice .Messages 3 }}", "slice"),
        ("{{ eq 1 `a` }}", "eq"),
        ("{{ json .System }}", "json"),
        ("{{ $y }}", "\\$y"),
        ("{{ .System.Role }}", "Role"),
        ("a\n{{ 'b' }}", "line 2"),
        ("{{ .System .Empty }}", "cannot be read"),
        ("{{ (.System }}", "cannot be read"),
        ("{{ .System", "cannot be read"),
    ],
)
def test_what_go_or_lite_refuses(template: str, word: str) -> None:
    """Each names what it could not do."""
    with pytest.raises(ExportError, match=word):
        execute(template, VALUES)


@pytest.mark.parametrize("text", ["{{", "a {{ .Content }} b", "{{{", "{", "}}", '{{ "x" }}', "a\n{% b %}"])
def test_literal_text_comes_out_as_it_went_in(text: str) -> None:
    """Also before an action."""
    assert execute(literal(text) + "{{ .System }}", VALUES) == text + "sys"


def test_ollama_joins_turns_of_one_role_and_puts_the_system_prompt_in_front() -> None:
    """.System is every system message joined by an empty line; .Messages has them in their places."""
    template = "<{{ .System }}>{{ range .Messages }}[{{ .Role }} {{ .Content }}]{{ end }}"
    user, system = {"role": "user", "content": "u"}, {"role": "system", "content": "s"}
    assert ollama_prompt(template, [user, user]) == "<>[user u\n\nu]"
    assert ollama_prompt(template, [user], system="d") == "<d>[system d][user u]"
    assert ollama_prompt(template, [system, user, system], system="d") == "<s\n\ns>[system s][user u][system s]"
