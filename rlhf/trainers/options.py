"""Which of ``transformers.TrainingArguments`` act here, and which are refused.

Every option acts, is refused by name where it would be ignored, or is handed on to transformers untouched.
"""

from typing import Any

REFUSED: dict[str, str] = {
    "label_smoothing_factor": "no loss here smooths labels by itself; DPO has --label_smoothing",
    "include_num_input_tokens_seen": "num_tokens is counted exactly and logged anyway",
    "past_index": "recurrent outputs are not carried over",
    "use_liger_kernel": "the head is never multiplied out whole here; Liger's kernels would replace that",
    "auto_find_batch_size": "use --tokens_per_batch or --gradient_accumulation_steps",
    "batch_eval_metrics": "metrics are sums over the data set whatever the batches",
    "include_for_metrics": "there is no compute_metrics; see docs/metrics.md for what is measured",
    "eval_use_gather_object": "metrics are tensors",
    "jit_mode_eval": "models are evaluated as they are trained",
    "torchdynamo": "use --torch_compile",
}
"""Options that would be ignored, and what to do instead."""


def check_options(args: Any) -> None:
    """Refuse what would be ignored.

    Raises:
        ValueError: names the option and what to do.
    """
    defaults = {name: field.default for name, field in type(args).__dataclass_fields__.items()}
    for name, why in REFUSED.items():
        value = getattr(args, name, None)
        if name in defaults and value and value not in (defaults[name], "no", []):
            raise ValueError(f"--{name} has no effect here: {why}")
