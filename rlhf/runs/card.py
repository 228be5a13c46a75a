"""The model card of a run: method, data, figures, and how to load the model."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from rlhf.runs.files import CARD_FILE, RUN_FILE, Run, read_run

_EVAL = "eval_"
# What depends on the machine, or says nothing about the model.
_NO_FIGURES = ("runtime", "per_second", "epoch", "step", "seconds", "num_tokens")


class Method(NamedTuple):
    """How a trainer trains, for the card."""

    title: str
    tag: str
    paper: str | None = None


_METHODS = {
    "SFTTrainer": Method("supervised fine-tuning", "sft"),
    "DPOTrainer": Method("direct preference optimization (DPO)", "dpo", "2305.18290"),
    "KTOTrainer": Method("Kahneman-Tversky optimization (KTO)", "kto", "2402.01306"),
    "RewardTrainer": Method("reward modelling on preference pairs", "reward-trainer"),
    "PPOTrainer": Method("proximal policy optimization (PPO)", "ppo", "1707.06347"),
    "GRPOTrainer": Method("group relative policy optimization (GRPO)", "grpo", "2402.03300"),
    "RLOOTrainer": Method("REINFORCE leave-one-out (RLOO)", "rloo", "2402.14740"),
    "OnlineDPOTrainer": Method("online DPO", "online-dpo", "2402.04792"),
    "BestOfNTrainer": Method("fine-tuning on the best of n own completions", "best-of-n"),
    "DistillTrainer": Method("knowledge distillation", "distillation", "2306.13649"),
}


def write_card(run_folder: Path, model_folder: Path) -> None:
    """Write the model card beside a model; nothing where the run has no record, as it was not trained.

    Args:
        run_folder: of the run.
        model_folder: holds the model, or its adapter.

    Raises:
        OSError: the card cannot be written.
    """
    if (run_folder / RUN_FILE).exists():
        card = model_card(read_run(run_folder), is_adapter=(model_folder / "adapter_config.json").exists())
        card.save(model_folder / CARD_FILE)


def model_card(run: Run, is_adapter: bool) -> ModelCard:
    """Describe the model that a run made.

    Paths are cut down to names: a card is made to be published.

    Args:
        run: as its folder describes it.
        is_adapter: whether the folder holds an adapter alone.

    Returns:
        The card; ``save`` writes it.
    """
    record = run.record
    trainer = record.get("trainer", "")
    is_reward_model = trainer == "RewardTrainer"
    method = _METHODS.get(trainer, Method(trainer or "training", "rlhf"))
    base = (record.get("model") or {}).get("name")
    sections = [
        f"# {run.name}",
        _introduction(method, base),
        "## Load it\n\n" + _how_to_load(run.name, is_adapter, is_reward_model),
        "## Figures\n\n" + _figures(run.metrics),
        "## Data\n\n" + _data(record.get("data") or []),
        "## Training\n\n" + _training(run),
    ]
    data = ModelCardData(
        base_model=base if base and _is_on_hub(base) else None,
        datasets=[entry["name"] for entry in record.get("data") or [] if _is_on_hub_data(entry)] or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if is_reward_model else "text-generation",
        tags=["rlhf", method.tag],
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _introduction(method: Method, base: str | None) -> str:
    origin = f"It was trained from {_name(base)} by" if base else "It was trained by"
    paper = f" ([arXiv {method.paper}](https://arxiv.org/abs/{method.paper}))" if method.paper else ""
    return f"{origin} {method.title}{paper}, with rlhf."


def _how_to_load(name: str, is_adapter: bool, is_reward_model: bool) -> str:
    head = "SequenceClassification" if is_reward_model else "CausalLM"
    module, cls = ("peft", f"AutoPeftModelFor{head}") if is_adapter else ("transformers", f"AutoModelFor{head}")
    labels = ", num_labels=1" if is_reward_model else ""
    code = [
        f"from {module} import {cls}",
        "from transformers import AutoTokenizer",
        "",
        f'model = {cls}.from_pretrained("{name}"{labels})',
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
    ]
    shell = "" if is_reward_model else f"\n\nOr talk to it: `rlhf chat {name}`."
    return "\n".join(["```python", *code, "```"]) + shell


def _figures(metrics: list[dict[str, Any]]) -> str:
    evaluations = [line for line in metrics if any(name.startswith(_EVAL) for name in line)]
    lines, prefix, rows = (
        (evaluations, _EVAL, "held-out rows") if evaluations else (_losses(metrics), "", "training rows")
    )
    if not lines:
        return "No figure was logged."
    first, last = lines[0], lines[-1]
    names = [name for name in last if name.startswith(prefix) and _is_figure(name) and _is_number(last[name])]
    # A single evaluation has nothing to be compared with.
    columns = [last] if first is last else [first, last]
    heading = [f"step {line.get('step', 0)}" for line in columns]
    table = _table(
        [f"on {rows}", *heading],
        ([f"`{name.removeprefix(prefix)}`", *(_number(line.get(name)) for line in columns)] for name in names),
    )
    return f"{table}\n\nAll of them are in `metrics.jsonl`."


def _losses(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in metrics if "loss" in line]


def _is_figure(name: str) -> bool:
    return not any(word in name for word in _NO_FIGURES)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> str:
    return f"{value:.4g}" if _is_number(value) else ""


def _data(entries: list[Mapping[str, Any]]) -> str:
    if not entries:
        return "Rows that were made in a program."

    def cells(entry: Mapping[str, Any]) -> list[str]:
        files = entry.get("files") or []
        hashes = ", ".join(f"`{file['xxh3'][:12]}`" for file in files[:3]) + (", …" if len(files) > 3 else "")
        rows = entry.get("rows")
        return [_name(entry["name"]), entry["use"], "" if rows is None else f"{rows:,}", hashes]

    return _table(["data", "use", "rows", "xxh3 of the files"], map(cells, entries))


def _training(run: Run) -> str:
    record = run.record
    model, machine = record.get("model") or {}, record.get("machine") or {}
    facts = {
        "parameters": f"{model['parameters']:,}, of them {model['trainable']:,} trained"
        if "trainable" in model
        else None,
        "steps": max((line.get("step", 0) for line in run.metrics), default=None),
        "time": f"{record['seconds']:,.0f} s" if record.get("seconds") else None,
        "machine": machine.get("accelerator") or machine.get("processor"),
        "processes": machine.get("processes"),
        "versions": ", ".join(f"{name} {number}" for name, number in (record.get("versions") or {}).items()),
    }
    options = {name: value for name, value in run.options.items() if not _is_place(name, value)}
    lines = [f"* {name}: {value}" for name, value in facts.items() if value]
    if options:
        lines += ["", _table(["option", "value"], ([f"`{name}`", f"`{value}`"] for name, value in options.items()))]
    return "\n".join(lines)


def _is_place(name: str, value: Any) -> bool:
    """Whether an option names something of the machine, which the reader of a card does not have."""
    texts = value if isinstance(value, list) else [value]
    return name == "output_dir" or any(isinstance(text, str) and ("/" in text or "\\" in text) for text in texts)


def _table(heading: list[str], rows: Iterable[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    # A bar would end the cell, and a line break the row.
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _name(place: str) -> str:
    """A name on the hub as it is; of a path its last part."""
    return place if _is_on_hub(place) else Path(place).name


def _is_on_hub(name: str) -> bool:
    """Whether a name can be one of the hub: ``owner/name``, and nothing of that name is here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _is_on_hub_data(entry: Mapping[str, Any]) -> bool:
    return not entry.get("files") and _is_on_hub(entry["name"]) and not Path(entry["name"]).suffix
