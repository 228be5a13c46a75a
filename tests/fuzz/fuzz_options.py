"""Odd values of options, on the command line and in YAML; templates, rewards, places, variables and packages."""

import sys
from dataclasses import fields
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from random import Random

from fuzz_world import COMMANDS, Case, World, write_json

from rlhf.cli.commands import COMMANDS as ALL_COMMANDS

NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2.5",
    "1e400",
    "9" * 400,
    "",
    "x",
    "１",
    "1e-9",
    "0x10",
    "1,5",
    "None",
]
TEXTS = ["", "x", "ü🙂", "\n", "a" * 500, "none", "auto", "../..", "file.py:name", "[1", "{}", "true", "[red]", "0"]
# Written again here, so that a mistake in the table of ranges is found.
NEVER_NEGATIVE = frozenset(
    [
        "learning_rate",
        "weight_decay",
        "warmup_steps",
        "gradient_accumulation_steps",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_length",
        "max_completion_length",
        "temperature",
        "top_p",
        "seed",
        "lora_r",
        "lora_dropout",
        "num_generations",
        "num_iterations",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "vf_coef",
        "gamma",
        "lam",
        "epsilon",
        "cliprange_value",
        "entropy_coef",
        "beta",
        "lmbda",
        "desirable_weight",
        "undesirable_weight",
        "teacher_top_k",
        "logging_steps",
        "save_steps",
        "dataset_num_proc",
    ]
)
# These two end the command in other ways, or start processes.
NOT_FUZZED = frozenset({"num_processes", "accelerate_config", "config", "help", "push_to_hub", "deepspeed", "fsdp"})


@cache
def options_of(command: str) -> dict[str, str]:
    """Names of the options of a command, and their annotations as text."""
    classes = [resolve_name(path) for path in ALL_COMMANDS[command].option_classes]
    found = {option.name: str(option.type) for cls in classes for option in fields(cls) if option.init}
    return {name: kind for name, kind in sorted(found.items()) if name not in NOT_FUZZED}


def is_number(kind: str) -> bool:
    return "int" in kind or "float" in kind


def option_case(random: Random, folder: Path, world: World) -> Case:
    """One option with an odd value."""
    command = random.choice(sorted(COMMANDS))
    options = options_of(command)
    numeric = [name for name, kind in options.items() if is_number(kind)]
    name = random.choice(numeric if random.random() < 0.7 else list(options))
    value = random.choice(NUMBERS if is_number(options[name]) else TEXTS + NUMBERS[:4])
    must = "refuse" if must_be_refused(name, options[name], value) else "either"
    words = [*world.words(command, folder), f"--{name}={value}"]
    # A tenth is trained with what was accepted.
    only_options = random.random() > 0.1 and must != "refuse"
    return Case("option", f"{command} --{name}={value[:20]!r}", words, must, only_options=only_options)


def must_be_refused(name: str, kind: str, value: str) -> bool:
    """What no option may be, known without the table of ranges."""
    if not is_number(kind) or "str" in kind:
        return False
    if value in ("", "x", "1,5", "nan") or (value in ("inf", "1e400") and name != "max_grad_norm"):
        return name != "reward_clip_range" or value not in ("inf", "1e400")
    return name in NEVER_NEGATIVE and value in ("-1", "-inf")


YAML_VALUES = [
    "[1, 2]", "{a: 1}", "null", "2020-01-01", "2020-13-45", "!!binary aGk=", "!!set {a}", "&a [*a]", "*nowhere", "nan",
    ".nan", ".inf", "yes", "'text'", "|\n  several\n  lines", "!!python/object:os.system x", "1:30", "0o17", "1_000",
    "[[[]]]", "[{a: [1]}]", "'\\x00'", "\"\\x07\"", "\t1", "{{a}}", "%x", "@x", "9" * 5000, "~", "''", "[null]",
]  # fmt: skip


def yaml_case(random: Random, folder: Path, world: World) -> Case:
    """A config file with an odd value, key or form."""
    command = random.choice(sorted(COMMANDS))
    options = options_of(command)
    name, must = random.choice(list(options)), "either"
    value = random.choice(YAML_VALUES)
    text = f"{name}: {value}\n"
    form = random.choice(["value", "value", "value", "twice", "odd key", "env", "other", "merge"])
    if form == "twice":
        text, must = f"{name}: 1\nprofile: 0\n{name}: 1\n", "refuse"
    elif form == "odd key":
        text, must = (
            random.choice(["1: 2\n", "? [a]\n: 1\n", "null: 1\n", "[a]: 1\n", "\tseed: 1\n", ": 1\n"]),
            "refuse",
        )
    elif form == "env":
        text = f"env: {value}\n" if random.random() < 0.5 else f"env: {{A: {value if len(value) < 20 else 1}}}\n"
    elif form == "other":
        text = random.choice(
            ["[]", "3", "- seed: 1", "text", "---\n---\n", "", "\ufeffseed: 1\n", "seed: 1\n...\nx", "]"]
        )
    elif form == "merge":
        text, must = f"<<: {{{name}: 1, {name}: 2}}\n", "refuse"
    file = folder / "options.yaml"
    file.write_bytes(text.encode() if random.random() > 0.03 else text.encode("utf-16"))
    words = [*world.words(command, folder), "--config", str(file)]
    return Case("yaml", f"{command}: {form}: {text[:60]!r}", words, must, only_options=True)


TEMPLATES = {
    "no jinja": ("{% for m in messages %}{{ m['content'] }}", "refuse"),
    "an unknown filter": ("{{ messages | nowhere }}", "refuse"),
    "an unknown name": ("{{ nowhere.content }}", "refuse"),
    "its own error": ("{{ raise_exception('no\nsuch role') }}", "refuse"),
    "a sum of text and a number": ("{{ messages[0]['content'] + 1 }}", "refuse"),
    "a missing key": ("{{ messages[7]['content'] }}", "refuse"),
    "nothing": ("", "either"),
    "no messages": ("hello", "refuse"),
    "a division by zero": ("{{ 1 // 0 }}", "refuse"),
    "a long loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "refuse"),
    "a long text": ("{{ 'a' * 300000000 }}", "refuse"),
    "a recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "refuse"),
    "a file": ("{% include '/etc/passwd' %}", "refuse"),
    "attributes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuse"),
    "a part of the turns": ("{{ messages[0]['content'] }}", "refuse"),
}


def template_case(random: Random, folder: Path, world: World) -> Case:
    """A chat template that cannot render the rows."""
    title = random.choice(sorted(TEMPLATES))
    text, must = TEMPLATES[title]
    template = folder / "chat.jinja"
    template.write_text(text)
    turns = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "the cat"}]
    file = write_json(folder / "rows.json", [{"messages": turns}] * 3)
    words = [*world.words("sft", folder, data=file), "--chat_template_path", str(template)]
    return Case("template", title, words, must)


REWARDS = {
    "no such file": (None, "score", "refuse"),
    "no such name": ("def other(completions): return [0.0] * len(completions)", "score", "refuse"),
    "no function": ("score = 3", "score", "refuse"),
    "no Python": ("def score(:", "score", "refuse"),
    "an error when it is imported": ("raise KeyError('data')", "score", "refuse"),
    "an exit when it is imported": ("import sys\nsys.exit(7)", "score", "refuse"),
    "a package that is missing": ("import nowhere_at_all", "score", "refuse"),
    "an error in a call": ("def score(completions, **k): return {}['a']", "score", "refuse"),
    "a memory error": ("def score(completions, **k): raise MemoryError", "score", "refuse"),
    "an exit in a call": ("import sys\ndef score(completions, **k): sys.exit(5)", "score", "refuse"),
    "another signature": ("def score(a, b, c, d): return [0.0]", "score", "refuse"),
    "no parameters": ("def score(): return [0.0]", "score", "refuse"),
    "too few": ("def score(completions, **k): return [0.0]", "score", "either"),
    "NaN": ("def score(completions, **k): return [float('nan')] * len(completions)", "score", "refuse"),
    "infinity": ("def score(completions, **k): return [float('inf')] * len(completions)", "score", "refuse"),
    "texts": ("def score(completions, **k): return ['good'] * len(completions)", "score", "refuse"),
    "None alone": ("def score(completions, **k): return None", "score", "refuse"),
    "a number alone": ("def score(completions, **k): return 1.0", "score", "refuse"),
    "a generator": ("def score(completions, **k): return (1.0 for _ in completions)", "score", "either"),
    "lists": ("def score(completions, **k): return [[1.0]] * len(completions)", "score", "refuse"),
    "whole numbers": ("def score(completions, **k): return [1] * len(completions)", "score", "accept"),
}


def reward_case(random: Random, folder: Path, world: World) -> Case:
    """A reward in a file, with a mistake."""
    title = random.choice(sorted(REWARDS))
    code, name, must = REWARDS[title]
    file = folder / "reward_file.py"
    if code is not None:
        file.write_text(code + "\n")
    words = world.words(random.choice(["grpo", "ppo", "online-dpo"]), folder)
    words[words.index("--reward_funcs") + 1] = f"{file}:{name}"
    return Case("reward", title, words, must, ("reward_file", "reward 'score'"))


VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION", "OMP_NUM_THREADS"]
VARIABLES += ["COLUMNS", "TMPDIR", "HF_HOME", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "LANG", "TERM", "HOME"]
PLACES = [
    "/dev/null/out",
    "/proc/out",
    "/sys/out",
    "/dev/null",
    "n" * 300,
    "",
    "out\n",
    "[red]out",
    "ü🙂",
    "{file}",
    "{file}/x",
]
PACKAGES = {
    "wandb": (["--report_to", "wandb"], "refuse"),
    "trackio": (["--report_to", "trackio"], "refuse"),
    "bitsandbytes": (["--use_peft", "--load_in_4bit", "true"], "refuse"),
    "galore_torch": (["--optim", "galore_adamw"], "refuse"),
    "flash_attn": (["--attn_implementation", "flash_attention_2"], "refuse"),
    "matplotlib": ([], "accept"),
    "trl": ([], "accept"),
}


def place_case(random: Random, folder: Path, world: World) -> Case:
    """An output folder, a variable or a package that will not do."""
    kind = random.choice(["output", "report", "variable", "package"])
    file = folder / "file"
    file.write_text("mine")
    place = random.choice(PLACES).replace("{file}", str(file))
    cannot_be = place.startswith(("/", "n" * 300)) or not place
    if kind == "output":
        words = world.words(random.choice(["sft", "grpo"]), folder)
        words[words.index("--output_dir") + 1] = place
        return Case("place", f"--output_dir {place[:30]!r}", words, "refuse" if cannot_be else "either", (place[:30],))
    if kind == "report":
        words = [
            "eval",
            "--model_name_or_path",
            str(world.path("model")),
            "--dataset_name",
            str(world.path("sft.jsonl")),
        ]
        must = "refuse" if cannot_be else "either"
        return Case(
            "place",
            f"--output_file {place[:30]!r}",
            [*words, "--output_file", place],
            must,
            ("output_file", place[:30]),
        )
    words = world.words("sft", folder)
    if kind == "variable":
        name, value = random.choice(VARIABLES), random.choice(["x", "", "-1", "0", "nan", "1e9", "/nowhere", "ü"])
        return Case("variable", f"{name}={value}", words, environment={name: value}, only_options=random.random() < 0.5)
    name = random.choice(sorted(PACKAGES))
    more, must = PACKAGES[name]

    def hide() -> None:
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[module]
        sys.modules[name] = None  # type: ignore[assignment]

    return Case("package", name, [*words, *more], must, before=hide, only_options=must == "accept")
