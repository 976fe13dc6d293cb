"""Cluster files with one thing wrong each: text, line, key path, words of the message."""

from __future__ import annotations

from dataclasses import dataclass

MODEL = "models:\n  - name: m\n    repo: org/m\n"
"""A smallest good file; keys appended to it belong to its only model."""


@dataclass(frozen=True, kw_only=True)
class BadFile:
    """One wrong file and what must be said about it."""

    name: str
    text: str
    line: int
    param: str
    says: tuple[str, ...]


def _bad(name: str, text: str, line: int, param: str, *says: str) -> BadFile:
    return BadFile(name=name, text=text, line=line, param=param, says=says)


UNREADABLE = (
    _bad("empty", "", 0, "", "empty"),
    _bad("only a comment", "# nothing\n", 0, "", "empty"),
    _bad("a list", "- name: m\n", 1, "", "mapping", "a list", "models:"),
    _bad("a word", "hello\n", 1, "", "mapping", '"hello"'),
    _bad("null", "~\n", 1, "", "mapping", "nothing"),
    _bad("tab", "models:\n\t- name: m\n", 2, "", "not valid YAML", "spaces, not tabs"),
    _bad("unclosed quote", 'models:\n  - name: "m\n', 3, "", "not valid YAML", "quotes"),
    _bad("unclosed list", "models: [\n", 2, "", "not valid YAML"),
    _bad("bad indentation", "models:\n  - name: m\n   repo: org/m\n", 3, "", "indentation"),
    _bad("two documents", MODEL + "---\n" + MODEL, 4, "", "second YAML document"),
    _bad(
        "python object",
        "models: !!python/object/apply:os.system ['true']\n",
        1,
        "",
        "python/object/apply:os.system",
        "not allowed",
    ),
    _bad("own tag", MODEL + "    dtype: !auto x\n", 4, "", "!auto", "not allowed"),
    _bad("control character", "models: \x07\n", 1, "", "control character"),
    _bad("unknown alias", "models: *m\n", 1, "", "alias *m"),
    _bad("recursive alias", "models: &m [*m]\n", 1, "", "alias *m"),
    _bad("key that is a list", "? [a, b]\n: 1\n", 1, "", "key must be a word"),
    _bad("too deep", "models: " + "[" * 40 + "]" * 40 + "\n", 1, "", "deeper than 16"),
    _bad("escape beyond unicode", 'cluster: {name: "\\UFFFFFFFF"}\n', 0, "", "cannot represent"),
    _bad(
        "alias bomb",
        "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
        5,
        "",
        "more than 10000 values",
    ),
)

WRONG = (
    _bad("no models", "cluster: {name: a}\n", 1, "models", "required"),
    _bad("models is empty", "models: []\n", 1, "models", "at least one"),
    _bad("models is null", "models:\n", 1, "models", "no value", "- name:"),
    _bad("models is a mapping", "models:\n  name: m\n", 1, "models", "list", "- name:"),
    _bad("a model is a word", "models:\n  - m\n", 2, "models[0]", "mapping", "keys: name"),
    _bad("no name", "models:\n  - repo: org/m\n", 2, "models[0].name", "required"),
    _bad("unknown key", MODEL + "    replica: 2\n", 4, "models[0].replica", "mean `replicas`?"),
    _bad("unknown top key", MODEL + "gatewey: {}\n", 4, "gatewey", "did you mean `gateway`?"),
    _bad("far-off key", MODEL + "    zzz: 2\n", 4, "models[0].zzz", "known keys: name, path"),
    _bad(
        "unknown nested key",
        MODEL + "    kv_cache:\n      mem: 1GiB\n      blocksize: 16\n",
        6,
        "models[0].kv_cache.blocksize",
        "did you mean `block_size`?",
    ),
    _bad("key twice", MODEL + "    name: n\n", 4, "", '"name" is written twice', "line 2"),
    _bad("bool for int", MODEL + "    replicas: true\n", 4, "models[0].replicas", "true is not"),
    _bad("text for int", MODEL + '    replicas: "2"\n', 4, "models[0].replicas", "no quotes"),
    _bad("underscores", MODEL + "    replicas: 1_0\n", 4, "models[0].replicas", "no underscores"),
    _bad("float for int", MODEL + "    replicas: 2.0\n", 4, "models[0].replicas", "2.0 is not"),
    _bad("zero", MODEL + "    replicas: 0\n", 4, "models[0].replicas", "out of range", "1 to 256"),
    _bad("negative", MODEL + "    replicas: -1\n", 4, "models[0].replicas", "-1 is out of range"),
    _bad("huge", MODEL + "    replicas: 1000000\n", 4, "models[0].replicas", "out of range"),
    _bad(
        "twenty digits", MODEL + f"    replicas: {'9' * 20}\n", 4, "models[0].replicas", "range"
    ),
    _bad(
        "thousands of digits", MODEL + f"    replicas: {'9' * 5000}\n", 4, "models[0].replicas",
        "...",
    ),
    _bad(
        "NaN", MODEL + "    resources: {cpus_per_rank: .nan}\n", 4,
        "models[0].resources.cpus_per_rank", ".nan is out of range",
    ),
    _bad(
        "infinity", MODEL + "    resources: {cpus_per_rank: .inf}\n", 4,
        "models[0].resources.cpus_per_rank", ".inf is out of range",
    ),
    _bad("list for mapping", MODEL + "    parallel: [2]\n", 4, "models[0].parallel", "mapping"),
    _bad("number for mapping", MODEL + "    parallel: 2\n", 4, "models[0].parallel", "keys: tp"),
    _bad("null mapping", MODEL + "gateway:\n", 4, "gateway", "no value", "keys: host"),
    _bad("null number", MODEL + "    replicas:\n", 4, "models[0].replicas", "no value", "1 to 256"),
    _bad("null path", "models:\n  - name: m\n    path:\n", 3, "models[0].path", "no value"),
    _bad("pp", MODEL + "    parallel: {pp: 2}\n", 4, "models[0].parallel.pp", "not available"),
    _bad("no group", MODEL + "    parallel: {dp: 0}\n", 4, "models[0].parallel.dp", "from 1"),
    _bad("odd ep", MODEL + "    parallel: {ep: all}\n", 4, "models[0].parallel.ep", "auto"),
    _bad("exchange", MODEL + "    moe: {exchange: fast}\n", 4, "models[0].moe.exchange", "flat"),
    _bad(
        "speculation without effect",
        MODEL + "    speculation:\n      method: none\n      prompt_lookup_min: 3\n", 6,
        "models[0].speculation.prompt_lookup_min", "has no effect with `method: none`",
    ),
    _bad(
        "n-grams the wrong way round", MODEL + "    speculation: {prompt_lookup_min: 5}\n", 4,
        "models[0].speculation.prompt_lookup_min", "5 is more than prompt_lookup_max 4",
    ),
    _bad(
        "offload without effect", MODEL + "    engine: tensor_parallel\n    offload: {}\n", 5,
        "models[0].offload", "has no effect with `engine: tensor_parallel`",
    ),
    _bad("unknown engine", MODEL + "    engine: magic\n", 4, "models[0].engine", "auto, tensor"),
    _bad("unknown dtype", MODEL + "    dtype: int8\n", 4, "models[0].dtype", "bfloat16"),
    _bad("unknown device", MODEL + "    device: tpu\n", 4, "models[0].device", "cpu, cuda"),
    _bad(
        "size without number", MODEL + "    kv_cache: {memory: lots}\n", 4,
        "models[0].kv_cache.memory", '"lots" is not a size', "KiB",
    ),
    _bad(
        "size with odd unit", MODEL + "    kv_cache: {memory: 2GX}\n", 4,
        "models[0].kv_cache.memory", "unknown unit", "GiB",
    ),
    _bad(
        "size too small", MODEL + "    kv_cache: {memory: 1KiB}\n", 4,
        "models[0].kv_cache.memory", "out of range", "64KiB",
    ),
    _bad(
        "negative size", MODEL + "    kv_cache: {memory: -5}\n", 4,
        "models[0].kv_cache.memory", "out of range",
    ),
    _bad(
        "flag as word", MODEL + "    kv_cache: {prefix_caching: yes}\n", 4,
        "models[0].kv_cache.prefix_caching", '"yes"', "true or false",
    ),
    _bad(
        "duration without unit", MODEL + "    limits: {step_timeout: 10}\n", 4,
        "models[0].limits.step_timeout", "10 lacks a unit", "ms, s, m or h",
    ),
    _bad(
        "duration too long", MODEL + "    limits: {step_timeout: 2h}\n", 4,
        "models[0].limits.step_timeout", "out of range",
    ),
    _bad(
        "duration as clock", MODEL + "    limits: {step_timeout: 1:30}\n", 4,
        "models[0].limits.step_timeout", '"1:30" is not a duration',
    ),
    _bad("capital name", "cluster: {name: Demo}\n" + MODEL, 1, "cluster.name", "small letters"),
    _bad("long name", f"cluster: {{name: {'a' * 41}}}\n" + MODEL, 1, "cluster.name", "40"),
    _bad(
        "model name with slash", "models:\n  - name: a/b\n    repo: org/m\n", 2,
        "models[0].name", "letters, digits",
    ),
    _bad(
        "model name is a number", "models:\n  - name: 7\n    repo: org/m\n", 2,
        "models[0].name", "not text", "quotes",
    ),
    _bad(
        "surrogate in a name", 'models:\n  - name: "a\\ud800"\n    repo: org/m\n', 2,
        "models[0].name", "\\ud800",
    ),
    _bad(
        "same name twice", MODEL + "  - name: m\n    repo: org/n\n", 4,
        "models[1].name", '"m" is already the name of models[0]',
    ),
    _bad("neither path nor repo", "models:\n  - name: m\n", 2, "models[0]", "`path`", "`repo`"),
    _bad(
        "path and repo", MODEL + "    path: .\n", 3, "models[0].repo", "exclude each other",
    ),
    _bad(
        "missing directory", "models:\n  - name: m\n    path: not/there\n", 3,
        "models[0].path", "does not exist", "looked at",
    ),
    _bad(
        "path is a file", "models:\n  - name: m\n    path: cluster.yaml\n", 3,
        "models[0].path", "is a file",
    ),
    _bad(
        "path with NUL", 'models:\n  - name: m\n    path: "a\\0b"\n', 3, "models[0].path", "\\x00",
    ),
    _bad(
        "revision without repo", "models:\n  - name: m\n    path: .\n    revision: v1\n", 4,
        "models[0].revision", "belongs to `repo`",
    ),
    _bad(
        "repo without organisation", "models:\n  - name: m\n    repo: m\n", 3,
        "models[0].repo", "org/name",
    ),
    _bad(
        "repo that climbs", "models:\n  - name: m\n    repo: ../../etc\n", 3,
        "models[0].repo", "org/name",
    ),
    _bad(
        "ports equal", MODEL + "gateway: {grpc_port: 9000, http_port: 9000}\n", 4,
        "gateway.http_port", "port 9000 is also gateway.grpc_port",
    ),
    _bad(
        "port of the dashboard", MODEL + "gateway: {http_port: 8265}\n", 4,
        "gateway.http_port", "port 8265 is also dashboard.port",
    ),
    _bad(
        "dashboard takes a default", "dashboard: {port: 8000}\n" + MODEL, 1,
        "dashboard.port", "port 8000 is also gateway.http_port",
    ),
    _bad("port 0", MODEL + "gateway: {http_port: 0}\n", 4, "gateway.http_port", "1 to 65535"),
    _bad("port 65536", MODEL + "gateway: {http_port: 65536}\n", 4, "gateway.http_port", "65535"),
    _bad("bad address", MODEL + "gateway: {host: 1.2.3.400}\n", 4, "gateway.host", "IPv4"),
    _bad("bad host", MODEL + "gateway: {host: 'a b'}\n", 4, "gateway.host", "host name"),
    _bad(
        "unknown limit", MODEL + "gateway:\n  limits:\n    max_logprob: 5\n", 6,
        "gateway.limits.max_logprob", "did you mean `max_logprobs`?",
    ),
    _bad(
        "33 models",
        "models:\n" + "".join(f"  - {{name: m{i}, repo: org/m}}\n" for i in range(33)),
        1,
        "models",
        "at most 32",
    ),
)  # fmt: skip
