"""Bad configs: one message with every mistake, each with its place, what was expected, what came and a way out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from runtime.config import ConfigError, load


def problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return caught.value.problems


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "nowhere.json")
    assert str(caught.value) == f"{tmp_path / 'nowhere.json'}: no such file"


def test_directory_lists_its_configs(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    assert problems(tmp_path) == ["expected a JSON file, got a directory; it contains config.json"]


def test_unreadable_file(tmp_path: Path) -> None:
    path = write(tmp_path, "{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert problems(path) == ["cannot be read: Permission denied"]


def test_path_with_a_null_byte() -> None:
    assert problems("a\0b")[0].startswith("not a path")


def test_not_json_shows_line_column_and_caret(tmp_path: Path) -> None:
    [text] = problems(write(tmp_path, '{\n  "bf16": {"enabled": true},\n  "fp16" {"enabled": false}\n}\n'))
    first, line, caret = text.split("\n")
    assert first.startswith("not JSON: line 3, column 10: ")
    assert line == '  "fp16" {"enabled": false}'
    assert line[caret.index("^")] == "{"


@pytest.mark.parametrize("end", ["", "\n", "  \n\n  "])
def test_what_is_missing_at_the_end_is_shown_after_the_last_line(tmp_path: Path, end: str) -> None:
    [text] = problems(write(tmp_path, '{\n  "bf16": {"enabled": true}' + end))
    first, line, caret = text.split("\n")
    assert first.startswith("not JSON: line 2, column 28: ") and first.endswith("(the file ends here)")
    assert line == '  "bf16": {"enabled": true}'
    assert caret == " " * len(line) + "^"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ('{"a": True}', "line 1, column 7: Expecting value (JSON writes true, false and null)"),
        ("# how\n{a: True}", "line 2, column 5: Expecting value (JSON writes true, false and null)"),
        ('{"a": 1', "line 1, column 8"),
        ("{type: AdamW, lr: 1}", "put it in double quotes"),
        ('{"a": "x" "b": 2}', "Expecting ',' delimiter"),
        ("{a: 1, // one\n b 2}", "line 2, column 4: Expecting ':' delimiter"),
        ("{a: 1 /* never ends", "line 1, column"),
        ("{" + '"a' + "0" * 100 + '": 0, ' * 3 + "/}", "line 1, column"),
    ],
)
def test_common_slips_get_a_hint(tmp_path: Path, text: str, hint: str) -> None:
    [message] = problems(write(tmp_path, text))
    assert hint in message
    excerpt, caret = message.split("\n")[1:]
    assert len(excerpt) <= 100
    assert len(caret) <= len(excerpt) + 1


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "the file is empty"),
        (b"  \n ", "the file is empty"),
        (b"\xff\xfe\x00", "not UTF-8 text (byte 0 is 0xff)"),
        (b"[1, 2]", "expected a JSON object at the top, {...}, got [1, 2] (a list)"),
        (b"3", "expected a JSON object at the top"),
        (b"[" * 5000, "not JSON"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 64 deep"),
        (b'{"train_batch_size": ' + b"9" * 5000 + b"}", "not usable"),
        (b" " * (16 * 2**20 + 1), "larger than 16 MiB"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, data: bytes, expected: str) -> None:
    [message] = problems(write(tmp_path, data))
    assert expected in message or "nested more than" in message


def test_byte_order_mark_is_fine(tmp_path: Path) -> None:
    assert load(write(tmp_path, b'\xef\xbb\xbf{"train_batch_size": 4}')).train_batch_size == 4


def test_duplicate_keys_name_both_lines(tmp_path: Path) -> None:
    text = '{\n "fp16": {"enabled": true},\n "zero_optimization": {\n  "stage": 1,\n  "stage": 2\n }\n}'
    assert problems(write(tmp_path, text)) == ["line 5: zero_optimization.stage is given twice (first on line 4)"]


def test_equal_keys_in_different_objects_are_no_duplicates(tmp_path: Path) -> None:
    load(write(tmp_path, '{"fp16": {"enabled": false}, "bf16": {"enabled": false}}'))


def test_strings_are_not_taken_for_structure(tmp_path: Path) -> None:
    config = load(write(tmp_path, '{"zerotop": {"data": {"files": ["{\\"a\\": NaN,", "a", "a"]}}}'))
    assert config.zerotop.data.files == ('{"a": NaN,', "a", "a")


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_nan_is_not_a_number(tmp_path: Path, word: str) -> None:
    text = '{\n "optimizer": {"type": "AdamW",\n  "params": {"lr": ' + word + "}}}"
    assert problems(write(tmp_path, text)) == [
        f"line 3: optimizer.params.lr: {word} is not a JSON number; expected a finite one"
    ]


def test_all_problems_at_once_with_lines_and_suggestions(tmp_path: Path) -> None:
    text = """{
  "train_batch_sise": 4,
  "zero_optimization": {"stgae": 2, "stage": "2"},
  "fp16": {"enabled": 1},
  "optimizer": {"type": "adanw"},
  "scheduler": {"type": "WarmupLr"},
  "zerotop": {"data": {"seqlen": 5}, "train": {"steps": 0}, "nodel": {}}
}"""
    found = problems(write(tmp_path, text), "zerotop.telemetry.hz=99")
    expected = [
        "line 2: train_batch_sise: unknown key. Did you mean train_batch_size?",
        "line 3: zero_optimization.stgae: unknown key. Did you mean zero_optimization.stage?",
        'line 3: zero_optimization.stage: expected a whole number, got "2" (a string)',
        "line 4: fp16.enabled: expected true or false, got 1",
        "line 5: optimizer.type: unknown optimizer adanw. Did you mean AdamW? Known: ",
        "line 6: scheduler.type: unknown scheduler WarmupLr. Did you mean WarmupLR? Known: ",
        "line 7: zerotop.data.seqlen: unknown key. Did you mean zerotop.data.seq_len?",
        "line 7: zerotop.train.steps: expected at least 1, got 0",
        "line 7: zerotop.nodel: unknown key. Did you mean zerotop.model?",
        "--set zerotop.telemetry.hz=99: zerotop.telemetry.hz: expected at most 50, got 99",
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert any(problem.startswith(start) for problem in found), (start, found)


@pytest.mark.parametrize(
    ("config", "meant"),
    [
        ({"lr": 1}, "optimizer.params.lr"),
        ({"stage": 2}, "zero_optimization.stage"),
        ({"steps": 2}, "zerotop.train.steps"),
        ({"zerotop": {"stage": 2}}, "zero_optimization.stage"),
        ({"bf16": {"enable": True}}, "bf16.enabled"),
        ({"optimizer": {"type": "SGD", "params": {"momentun": 0.9}}}, "optimizer.params.momentum"),
        ({"zero_optimisation": {}}, "zero_optimization"),
        ({"wall_clock_brakdown": True}, "wall_clock_breakdown"),
    ],
)
def test_unknown_key_is_found_where_it_belongs(config: dict[str, Any], meant: str) -> None:
    [problem] = problems(config)
    assert problem.endswith(f"unknown key. Did you mean {meant}?")


def test_unknown_key_like_no_other_lists_the_known_ones() -> None:
    [problem] = problems({"zerotop": {"train": {"qqqqqq": 1}}})
    assert problem == "zerotop.train.qqqqqq: unknown key. Known keys of zerotop.train: steps, seed"


def test_a_key_that_deepspeed_passes_over_is_a_note() -> None:
    config = load({"fp16": {"fp16_scale_tolerance": 0.0}, "optimizer": {"type": "AdamW", "origin": "a tool"}})
    notes = config.resolve(1, "cpu").notes
    for key in ("fp16.fp16_scale_tolerance", "optimizer.origin"):
        [note] = [note for note in notes if note.startswith(f"{key}: no effect here, because it is an unknown key.")]
        assert note.endswith(("min_loss_scale, auto_cast", "type, params"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"gradient_clipping": -1}, "gradient_clipping: expected at least 0, got -1"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping: expected a finite number, got NaN"),
        ({"gradient_clipping": 10**400}, "gradient_clipping: expected a number that fits a float"),
        ({"gradient_clipping": True}, "gradient_clipping: expected a number, got true"),
        ({"bf16": True}, "bf16: expected an object, got true"),
        ({"bf16": {"enabled": "yes"}}, 'bf16.enabled: expected true or false, got "yes" (a string)'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: expected a whole number, got true"),
        ({"zero_optimization": {"offload_optimizer": {"device": "disk"}}}, 'expected "none" or "cpu", got "disk"'),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload to NVMe is not supported"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16 and bf16 are both enabled"),
        ({"communication_data_type": "int8"}, 'expected "fp32", "bf16" or "fp16", got "int8"'),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
        ({"optimizer": {"type": "auto"}}, 'expected a name such as AdamW, got "auto"'),
        ({"optimizer": {"type": 3}}, "expected a name such as AdamW, got 3"),
        ({"optimizer": {"type": "AdamW", "params": []}}, "optimizer.params: expected an object"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, "optimizer.params.lr: expected at least 0, got -1"),
        ({"optimizer": {"type": "AdamW", "params": {"eps": 0}}}, "optimizer.params.eps: expected more than 0, got 0"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 1]}}}, "each at least 0 and less than 1"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}, "expected a list of two numbers, got 0.9"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "x"]}}}, 'expected a number, got "x"'),
        ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "write gradient_clipping at the top"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "AdamW has no amsgrad here"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_max_lr": 1}}}, "scheduler.params.cycle_min_lr"),
        (
            {"scheduler": {"type": "LRRangeTest", "params": {"lr_range_test_min_lr": [1e-3, -1.0]}}},
            "scheduler.params.lr_range_test_min_lr: expected at least 0, got -1.0",
        ),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "exp"}}}, 'expected "log" or "linear"'),
        ({"zerotop": {"model": {"preset": "gpt-tny"}}}, "Did you mean gpt-tiny?"),
        ({"zerotop": {"model": {"preset": "gpt-tiny", "path": "x"}}}, "preset and path are both given"),
        ({"zerotop": {"data": {"seq_len": 0}}}, "zerotop.data.seq_len: expected at least 1, got 0"),
        ({"zerotop": {"data": {"files": 3}}}, "zerotop.data.files: expected a list of strings, got 3"),
        ({"zerotop": {"data": {"files": ["a", 3]}}}, "zerotop.data.files: expected a string, got 3"),
        ({"zerotop": {"data": {"tokenizer": " "}}}, "expected a string with something in it"),
        ({"zerotop": {"train": {"seed": -1}}}, "zerotop.train.seed: expected at least 0, got -1"),
        ({"zerotop": {"telemetry": {"hz": 0.1}}}, "zerotop.telemetry.hz: expected at least 0.5, got 0.1"),
        ({"zerotop": {"checkpoint": {"keep": 0}}}, "zerotop.checkpoint.keep: expected at least 1, got 0"),
        ({"zerotop": {"checkpoint": {"interval": -1}}}, "zerotop.checkpoint.interval: expected at least 0, got -1"),
        ({"zerotop": {"log": {"level": "warn"}}}, "Did you mean warning?"),
        ({"zerotop": {"log": {"interval": 0}}}, "zerotop.log.interval: expected at least 1, got 0"),
        ({"elasticity": {"enabled": True}}, "elasticity: it chooses the batch sizes by itself"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zerotop keeps results exact"),
        ({"zero_optimization": {"mics_shard_size": 8}}, "shards over all ranks"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "optimizer states are always fp32"),
        ({"gradient_allreduce_op": "max"}, 'gradient_allreduce_op: expected "mean" or "sum", got "max"'),
        ({"torch_autocast": {"enabled": True}}, 'write "bf16": {"enabled": true} instead'),
        ({"expert_parallel": {"enabled": True}}, "there is no expert parallelism"),
        ({3: 4}, "3: unknown key"),
    ],
)
def test_one_bad_value(config: dict[Any, Any], expected: str) -> None:
    [problem] = problems(config)
    assert expected in problem


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor", "Muon", "SparseAdam", "Lamb", "Lion", "OneBitAdam", "MuAdam"])
def test_optimizers_that_do_not_fit_say_why(name: str) -> None:
    [problem] = problems({"optimizer": {"type": name}})
    assert f"{name} cannot run here: " in problem
    assert "Use AdamW" in problem


def test_messages_cannot_steer_the_terminal() -> None:
    with pytest.raises(ConfigError) as caught:
        load({"\x1b[31mred\ud800": 1})
    str(caught.value).encode()
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "--set steps: expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("zerotop..steps=3", "expected key=value"),
        ("train_batch_size.x=3", "--set train_batch_size.x=3: train_batch_size is 8, not an object"),
        ("zerotop.train.stps=3", "--set zerotop.train.stps=3: zerotop.train.stps: unknown key. Did you mean zerotop"),
        ("zerotop.train.steps=many", "--set zerotop.train.steps=many: zerotop.train.steps: expected a whole number"),
        ("zerotop.train.steps=NaN", 'got "NaN" (a string)'),
        ("bf16.deep.er=1", "--set bf16.deep.er=1: bf16.deep: unknown key"),
        ('bf16={"enabld": true}', '--set bf16={"enabld": true}: bf16.enabld: unknown key. Did you mean bf16.enabled?'),
    ],
)
def test_bad_override(override: str, expected: str) -> None:
    [problem] = problems({"train_batch_size": 8}, override)
    assert expected in problem


def test_override_wins_over_the_line_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, '{"bf16": {"enabled": true}}')
    [problem] = problems(path, 'bf16={"enabled": 3}')
    assert problem.startswith("--set bf16=")


def test_overrides() -> None:
    source = {"zero_optimization": True, "zerotop": {"train": {"steps": 5}}}
    overrides = ["zerotop.train.steps=50", "optimizer.type=SGD", "zero_optimization.stage=2", "zerotop.data.files=*.md"]
    config = load(source, overrides)
    assert config.zerotop.train.steps == 50
    assert config.optimizer is not None
    assert config.optimizer.type == "SGD"
    assert config.zero_optimization.stage == 2
    assert config.zerotop.data.files == ("*.md",)
    assert source == {"zero_optimization": True, "zerotop": {"train": {"steps": 5}}}
    assert load(config.raw).model_dump() == config.model_dump()


def every_key() -> list[str]:
    from runtime.config import Config
    from runtime.config.deepspeed_keys import NO_EFFECT, REFUSED, SPELLINGS
    from runtime.config.keys import key_paths
    from runtime.config.optimizers import PARAMS
    from runtime.config.schedulers import PARAMS as SCHEDULES

    params = [f"optimizer.params.{name}" for model in PARAMS.values() for name in model.model_fields]
    params += [f"scheduler.params.{name}" for model in SCHEDULES.values() for name in model.model_fields]
    ours = [".".join(path) for path in key_paths(Config, ())]
    old = ["zero_optimization.cpu_offload", "zero_optimization.cpu_offload_param", "allgather_size", "compile.passes"]
    return sorted({*ours, *params, *NO_EFFECT, *REFUSED, *SPELLINGS, *old})


STRANGE: list[Any] = [
    None, True, False, 0, -1, 3, 0.5, 1e300, float("nan"), float("inf"), 10**400,
    "", "x", "auto", "cpu", "\0", "y" * 9999, [], [1, 2], [[]],
    {}, {"a": 1}, {"enabled": True}, {"enabled": "auto"}, {"enabled": {}}, {"type": []}, {"params": 3}, object(),
]  # fmt: skip


def around(key: str) -> dict[str, Any]:
    """A config in which `key` is known: params belong to one optimizer or schedule, and others to a Hugging Face
    model."""
    from runtime.config.optimizers import PARAMS
    from runtime.config.schedulers import PARAMS as SCHEDULES

    section, _, name = key.partition(".params.")
    tree: dict[str, Any] = {}
    for kind, table in (("optimizer", PARAMS), ("scheduler", SCHEDULES)):
        takers = [taker for taker, model in table.items() if not name or section != kind or name in model.model_fields]
        fields = table[takers[0]].model_fields
        tree[kind] = {"type": takers[0], "params": {name: 0.1 for name, field in fields.items() if field.is_required()}}
    if key.startswith(("zerotop.lora", "zerotop.evaluation", "zerotop.model.")) and key != "zerotop.model.preset":
        tree["zerotop"] = {"model": {"path": "model"}, "data": {"files": ["chats.jsonl"]}}
    return tree


@pytest.mark.parametrize("key", every_key())
def test_no_value_of_any_key_gives_a_traceback(key: str) -> None:
    """Whatever stands there, the outcome is a usable config or a ConfigError with a message."""
    usable = 0
    for value in STRANGE:
        tree = place = around(key)
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
        try:
            resolved = load(tree).resolve(2, "cuda")
        except ConfigError as error:
            assert error.problems
            assert all(len(problem) < 1000 for problem in error.problems)
        else:
            usable += 1
            assert resolved.from_json(resolved.to_json()) == resolved
    assert usable > 0 or key.endswith(".type"), "not even null is taken"


def test_long_names_are_cut_short() -> None:
    found = problems({"y" * 9999: 1}, "x=" + "z" * 9999)
    assert len(found) == 2
    assert all(len(problem) < 1000 for problem in found)
